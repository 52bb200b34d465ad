"""The HTTP API of the service: exchanges, formats, errors, retries and limits."""

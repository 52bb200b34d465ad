"""The HTTP API: one call, its retries and its limits."""

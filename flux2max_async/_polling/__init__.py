"""When to poll, and following one task."""

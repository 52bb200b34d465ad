"""One task from its submit to its end."""

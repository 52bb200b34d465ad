"""Polling schedules, and the poller that follows one task."""

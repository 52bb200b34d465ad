"""The SQLite file in which several processes count their tasks in flight."""

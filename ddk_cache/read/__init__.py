"""The reader's side: a cache → rows."""

"""Finished caches to other places, and what others have written into caches."""

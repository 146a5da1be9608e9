"""Rows of a cache → batches."""

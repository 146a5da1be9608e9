"""Rows of a cache → batches on the device."""

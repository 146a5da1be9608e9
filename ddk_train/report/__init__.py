"""Run directories → tables, a page and JSON. Nothing here imports torch."""

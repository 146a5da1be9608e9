"""A teacher that a serving engine runs."""

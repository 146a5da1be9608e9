"""The measurements of `torture.py` and what they share."""

"""The measurements of `stress.py` and what they share."""

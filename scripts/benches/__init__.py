"""The measurements of `bench.py`, one a module: each has a click command `main`."""

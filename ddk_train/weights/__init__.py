"""Measured gaps → sampling weights of the domains, in float64 NumPy."""

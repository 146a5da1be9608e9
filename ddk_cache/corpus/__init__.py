"""Documents → token rows."""

"""The run directory: settings, metrics, history, checkpoints, and who holds it."""

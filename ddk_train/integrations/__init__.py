"""Distillation from a cache in other people's trainers."""

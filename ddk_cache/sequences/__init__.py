"""Whole responses: a model answers prompts, and two answers to one prompt make a pair."""

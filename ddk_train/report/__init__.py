"""Run directories → what people look at. No torch here."""

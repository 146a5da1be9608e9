"""What a cache holds, shown as tables and as text, and whether it is still what was committed."""

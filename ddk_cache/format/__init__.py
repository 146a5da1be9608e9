"""What the bytes of a cache mean; docs/format.md is the same in words."""

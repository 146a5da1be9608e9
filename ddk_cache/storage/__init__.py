"""Where the bytes of a cache lie: a directory, or an object store."""

"""The writer's side: documents and a teacher → a cache."""

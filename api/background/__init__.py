"""The background work of an API server: the supervisor, its periodic actions, and loops that claim tasks."""

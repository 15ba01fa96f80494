"""Live streams as server-sent events."""

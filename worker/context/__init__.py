"""What a worker has: settings, database, device, heartbeat, spans."""

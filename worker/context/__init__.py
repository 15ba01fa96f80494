"""The state of a worker: settings, database, device, heartbeat, spans."""

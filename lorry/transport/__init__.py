"""HTTP, retries, server-sent events, and the proof of the service identity."""

"""HTTP, retries, server-sent events, and verification of the service's identity."""

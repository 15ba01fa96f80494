"""Who sends a request: API keys, sessions, scopes, the identity of the service."""

"""Authentication and authorization of requests: API keys, browser sessions, scopes, the identity of the service."""

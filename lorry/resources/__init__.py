"""The resources of the HTTP API, one module each. They map calls to requests, and responses to models."""

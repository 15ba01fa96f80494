"""Benchmarks of the HTTP API server and its database: rates, pages of a large database, listeners, claims."""

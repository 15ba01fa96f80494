"""Benchmarks of the HTTP API server and its database: rates, and pages of a large database."""

"""Measures Lorry against the ways that people train adapters today: `make bench`, or `python -m benchmarks`."""

"""Benchmarks of Lorry against common ways to train adapters: `make bench`, or `python -m benchmarks`."""

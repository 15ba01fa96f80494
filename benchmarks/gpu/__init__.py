"""Benchmarks of the engine on a GPU: base models of 1B and 8B with random weights, compared to PEFT in one process."""

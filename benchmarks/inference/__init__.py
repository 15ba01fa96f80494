"""Benchmark of inference: many adapters and streams, compared with PEFT."""

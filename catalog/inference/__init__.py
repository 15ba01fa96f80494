"""Inference requests: submission by an API process, and claims of workers. Imports registry and fleet."""

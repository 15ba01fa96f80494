"""Tokens, their order, work units and microbatches. Knows no model."""

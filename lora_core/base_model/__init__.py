"""Load, patch, shard and quantize a base model, and its identity."""

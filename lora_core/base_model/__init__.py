"""Loading, patching, sharding, quantization and identity of a base model."""

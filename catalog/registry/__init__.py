"""Base models, adapters, checkpoints, permissions and lineage."""

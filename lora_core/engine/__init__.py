"""The training engine: admits, trains, checkpoints and evicts many jobs on one base model."""

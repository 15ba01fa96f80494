"""The append-only log of changes and its hash chain."""

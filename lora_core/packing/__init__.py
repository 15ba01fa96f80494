"""A step's packed batch: segments, key-value cache, block range, embedding noise."""

"""The packed batch of a tick: segments, key-value cache, range of blocks, embedding noise."""

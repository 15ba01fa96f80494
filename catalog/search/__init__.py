"""What a sweep searches: its specification, search space, design and successive halving."""

"""Hyperparameter search: specification, search space, design and successive halving of a sweep."""

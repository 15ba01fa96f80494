"""Losses: cross-entropy, pairwise preference losses and KTO."""

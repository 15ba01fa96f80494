"""Ranks, collectives, and the first failure among them."""

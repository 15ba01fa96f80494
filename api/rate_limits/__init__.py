"""Limits per key, project and address."""

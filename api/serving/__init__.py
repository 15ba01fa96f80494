"""Serving endpoints: keeps their adapters loaded, and sends them requests."""

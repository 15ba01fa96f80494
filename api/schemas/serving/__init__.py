"""Schemas of serving endpoints, and of deployments on them."""

"""Schemas of exports, serving endpoints, and deployments on them."""

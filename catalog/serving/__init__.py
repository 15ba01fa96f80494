"""Serving endpoints, deployments of adapters on them, and the requests that they answer."""

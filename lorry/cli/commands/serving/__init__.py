"""Commands for serving endpoints, and for deployments on them."""

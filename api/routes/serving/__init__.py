"""Routes of serving endpoints, and of deployments on them."""

"""Routes of exports, serving endpoints, and deployments on them."""

"""Commands for exports, serving endpoints, and deployments on them."""

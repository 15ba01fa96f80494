"""Several nodes that train one job: leading, and lending devices to a leader."""

"""Running a service, or the workers of a node, as child processes on this machine. No HTTP client, no torch."""

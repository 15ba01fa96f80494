"""Runs a service, or the workers of a node, as child processes on this machine. Imports no HTTP client and no torch."""

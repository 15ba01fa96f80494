"""Gangs: nodes that train a job together. One worker leads; the others participate with their devices."""

"""Gangs: nodes that train a job together. One worker leads, and the others participate with their devices."""

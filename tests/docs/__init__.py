"""Runs the commands and the Python of the pages against a real local service."""

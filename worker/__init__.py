"""Trains jobs on one node: claims them, starts trainers, and publishes their adapters."""

"""Garbage collection, audit anchors, backup and restore."""

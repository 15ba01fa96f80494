"""Backups of a service's database and store, and restoring one.

docs/OPERATIONS.md says why a backup is consistent although it is made while the service writes.
"""

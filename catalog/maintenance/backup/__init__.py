"""Backup and restore of a service's database and artifact store.

docs/explanation/backups.md explains why a backup is consistent although the service keeps writing during it.
"""

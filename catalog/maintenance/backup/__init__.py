"""Backup and restore of a service's database and artifact store.

docs/decisions/0014-back-up-files-database-files.md explains why a backup is consistent although the service keeps
writing during it.
"""

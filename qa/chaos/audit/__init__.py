"""Checks the database and the store of a service against the invariants of the fault matrix."""

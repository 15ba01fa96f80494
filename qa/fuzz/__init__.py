"""Fuzzes the API of a whole service with schemathesis."""

"""Measures the HTTP api and what is under it: rates, pages of a large database, listeners, claims."""

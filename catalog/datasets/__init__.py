"""Validation of data sets. Pure: no database."""

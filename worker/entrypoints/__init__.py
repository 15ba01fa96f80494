"""Processes that an operator starts."""

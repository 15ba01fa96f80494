"""The system of record and its rules: valid job requests, scheduling decisions, and history.

It does not depend on HTTP, message delivery or tensors. docs/explanation/architecture.md shows its packages as layers.
"""

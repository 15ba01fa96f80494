"""The system of record and its rules: what a job may ask for, what happens next, and what happened.

It knows nothing of HTTP, of the delivery of messages, or of tensors. docs/ARCHITECTURE.md shows its packages as layers.
"""

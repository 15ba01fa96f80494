"""System of record and its rules: what may be asked for, what happens next, and what happened.

Knows nothing of HTTP, of Celery's delivery or of tensors. Only `jobs` and `claims` write a job's state.
"""

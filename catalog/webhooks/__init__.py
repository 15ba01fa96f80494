"""Webhooks (standardwebhooks.com): endpoints of a project, the outbox of events for them, and how tries go.

Nothing here speaks HTTP: api/webhooks/delivery_loop.py sends what `sending` hands out.
"""

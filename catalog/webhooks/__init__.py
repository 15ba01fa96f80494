"""Webhooks (standardwebhooks.com): endpoints of a project, the outbox of events, and delivery attempts.

api/webhooks/delivery_loop.py sends over HTTP what delivery_queue.py leases to it.
"""

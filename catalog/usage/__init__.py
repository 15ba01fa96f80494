"""Counters, the daily ledger, quotas and the usage report."""

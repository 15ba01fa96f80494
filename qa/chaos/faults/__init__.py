"""All faults, by the part of the service that they affect. Each has another mechanism.

A fault that depends on transactions, locks or leases runs on both databases, and any other on SQLite.
"""

from __future__ import annotations

from qa.chaos.environment import FAULTS
from qa.chaos.faults import backends, inference, jobs, processes, storage

__all__ = ["FAULTS", "backends", "inference", "jobs", "processes", "storage"]

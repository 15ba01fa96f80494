"""Exports of adapters in the formats of serving engines: requests of users, and the operations of workers."""

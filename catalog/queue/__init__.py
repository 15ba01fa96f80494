"""Gives jobs to workers: snapshot of the queue, claims, usage charging, preemption and notifications."""

"""The scheduling decision and its reasons: pure functions of a snapshot of the queue. Read scheduler.py first.

A decision shown to a project contains nothing of another project's jobs.
"""

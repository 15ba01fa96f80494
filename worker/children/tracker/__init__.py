"""The child process that writes a run to a tracker, with one module per tracker.

A module imports its tracker's library when it opens a run.
"""

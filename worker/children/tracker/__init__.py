"""The child process that writes a run to a tracker. There is one module per tracker.

A module imports its tracker's library when it opens a run.
"""

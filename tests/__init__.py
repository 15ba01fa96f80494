"""Tests. Their folders mirror the packages.

`system` runs all processes together, `architecture` checks the structure of the code, and `services` starts the servers
that tests need.
"""

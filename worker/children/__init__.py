"""Code that runs only in child processes.

It imports nothing of the worker except `process`, `protocol` and `node`.
"""

"""Code that runs in a child process and nowhere else.

Imports nothing of the worker but `process`, `protocol` and `node`.
"""

"""One trainer with its jobs, as the worker sees it: messages, events, failures, memory.

Runs in the worker's process.
"""

"""One trainer with its jobs, from the worker's side: messages, events, failures, memory.

This code runs in the worker's process.
"""

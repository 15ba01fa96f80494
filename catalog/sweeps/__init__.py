"""Sweeps: several jobs that differ in stated fields, asked for in one call. Each trial is an ordinary job.

spec, fields, space, halving and design are pure; creation, controller, observing, verbs and reading know the tables.
"""

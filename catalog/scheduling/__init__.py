"""What is decided about the queue, and why: pure functions of a picture of it, which others make from the database.

Read scheduler.py first. A decision tells nobody about another project's jobs.
"""

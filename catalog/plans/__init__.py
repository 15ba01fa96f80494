"""What a job would come to, and what there is to say against it: pure functions of its spec and of what is known.

No tables and no database: plans.py asks those.
"""

"""The HTTP face: parse a request, make one call to `catalog`, shape the answer.

Knows nothing of SQL and of training; importing it loads no torch.
"""

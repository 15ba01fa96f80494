"""The HTTP API: parse a request, make one call to `catalog`, shape the response.

This package contains no SQL and no training code. Importing it does not load torch.
"""

"""Servers that the tests need: found on the machine, or installed, or reported as missing with the reason."""

"""Brings the servers that tests need: found on the machine, else installed, else a reason why not."""

"""Starts, confines, watches and kills child processes."""

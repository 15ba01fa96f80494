"""The child process that tokenizes a data file."""

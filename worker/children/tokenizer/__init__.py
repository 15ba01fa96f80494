"""The child process that turns a data file into tokens."""

"""The command `lorry`: one file per group; nothing heavy is imported before a command runs.

Exit codes: 0 done; 1 the service or a check refused; 2 wrong usage; 3 a signature was not checked; 130 interrupted.
"""

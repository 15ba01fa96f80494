"""The command `lorry`: one file per group; nothing heavy is imported before a command runs.

Exit codes: 0 success; 1 the service or a check failed; 2 wrong usage; 3 a signature was not checked; 130 interrupted.
"""

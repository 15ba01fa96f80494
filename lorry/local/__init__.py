"""Running a whole service on this machine, as child processes: what `lorry up` does. No HTTP client, no torch."""

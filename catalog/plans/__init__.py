"""Plans: dry runs that estimate a job's memory, duration and start, and list warnings, before it is submitted."""

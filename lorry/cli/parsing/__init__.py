"""Options and arguments."""

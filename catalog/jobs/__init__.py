"""A person's actions on a job: submit, cancel, pause, explain."""

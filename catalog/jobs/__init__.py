"""User actions on a job: submit, cancel, pause, resume, explain."""

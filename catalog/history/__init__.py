"""Events, metrics, logs and result files of a job, and its runs in trackers."""

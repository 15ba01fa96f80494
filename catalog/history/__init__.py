"""Events, metrics, logs and results of a job, and the export of its curves to trackers."""

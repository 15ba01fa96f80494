"""Events, metrics, logs and result files of a job, and the export of its curves to trackers."""

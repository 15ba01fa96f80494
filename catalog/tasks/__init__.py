"""The queue of background tasks, which API servers and workers share."""

"""Starts a worker with the only options that celery_app.py supports: `python -m worker.entrypoints.celery_worker`.

Further arguments are those of `celery worker`, such as `--hostname=NAME@%h`.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
from __future__ import annotations

import sys

from celery.__main__ import main

OPTIONS = (
    "--quiet",  # no banner, whose lines are not JSON
    "--app=worker.entrypoints.celery_app",
    "worker",
    "--queues=lorry",
    "--concurrency=1",
    # Workers don't communicate with each other, because all shared state is in the database.
    "--without-gossip",
    "--without-mingle",
    "--loglevel=INFO",
)

if __name__ == "__main__":
    sys.argv[1:1] = OPTIONS
    sys.exit(main())

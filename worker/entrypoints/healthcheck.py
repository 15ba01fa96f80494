"""Exit status 0 if a worker on this host sends heartbeats: `python -m worker.entrypoints.healthcheck`.

It queries the database and not the broker, because leases depend on the heartbeats in the database.
"""

from __future__ import annotations

import socket
import sys

from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.fleet import views
from catalog.settings import InvalidSettings, Settings


def main() -> int:
    """Return 0 if a worker on this host is alive, else 1. Prints the workers' states on stderr."""
    try:
        db = Database(Settings().resolved_database_url())
    except InvalidSettings as error:
        sys.stderr.write(error.sentence() + "\n")
        return 1
    try:
        states = [view.state for view in views.workers(db) if view.worker.host == socket.gethostname()]
    except LorryError as error:
        sys.stderr.write(error.sentence() + "\n")
        return 1
    finally:
        db.close()
    sys.stderr.write(f"Workers on this host: {', '.join(states) or 'none'}.\n")
    return 0 if {"idle", "busy", "draining"} & set(states) else 1


if __name__ == "__main__":
    sys.exit(main())

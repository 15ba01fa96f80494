"""Exit status 0 if a worker on this host sends heartbeats: `python -m worker.entrypoints.healthcheck`.

Asks the database, not the broker: the heartbeat there is what leases rest on.
"""

from __future__ import annotations

import socket
import sys

from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.fleet import views
from catalog.settings import Settings


def main() -> int:
    """0: alive. 1: none is. Says which on stderr."""
    db = Database(Settings().resolved_database_url())
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

"""A process that writes to a SQLite database from several threads without a pause, until its standard input closes."""

from __future__ import annotations

import sys
import threading

from sqlalchemy import text

from catalog.db.database import Database

THREADS = 4
COUNTER = 2
"""Id of the `pulse` row whose `seen_at` counts the transactions."""
WORK = text(
    "with recursive numbers(n) as (select 1 union all select n + 1 from numbers where n < 200000) "
    "select count(*) from numbers"
)
"""A query that takes a few milliseconds of processor time."""
ADD = text(f"update pulse set seen_at = seen_at + 1 where id = {COUNTER}")


def main(url: str) -> None:
    db, stop = Database(url), threading.Event()

    def write() -> None:
        while not stop.is_set():
            with db.write() as session:
                session.execute(WORK)
                session.execute(ADD)

    threads = [threading.Thread(target=write) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1])

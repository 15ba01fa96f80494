# pyright: basic
"""Reports the failure of one rank to the others, so that they exit for this reason and not after a collective timeout.

The report goes through the rendezvous store. A rank that fails in a pass can't send a message, because the others may
be blocked in a collective that waits for it.
"""

import faulthandler
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist

from lora_core.distributed.ranks import Ranks

KEY = "lorry/first-failure"
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""Wait after a reported failure. A rank that waits for the failed one usually gets an error from the OS sooner."""


class FellowFailure(RuntimeError):
    """Rank `rank` failed first."""

    def __init__(self, *, rank: int, message: str) -> None:
        super().__init__(f"Rank {rank} failed: {message}")
        self.rank = rank


@contextmanager
def broadcast_failures(ranks: Ranks) -> Iterator[None]:
    """Make an exception inside the block terminate all ranks.

    The first rank to fail raises its own exception. The others raise FellowFailure, unless the first one was killed
    before it could report its failure.
    """
    if ranks.size == 1:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(ranks.rank, done), name="fellows", daemon=True).start()
    try:
        yield
    except Exception as error:
        first = _report(ranks.rank, error)
        if first is None or first["rank"] == ranks.rank:
            raise
        raise FellowFailure(**first) from error
    finally:
        done.set()


def _report(rank: int, error: Exception) -> dict[str, Any] | None:
    """Return the first reported failure, which may be another rank's. None if the store is not reachable."""
    message = f"{type(error).__module__}.{type(error).__qualname__}: {error}".removeprefix("builtins.")
    failure = json.dumps({"rank": rank, "message": message.partition("\n")[0][:500]})
    try:
        return json.loads(_store().compare_set(KEY, "", failure))
    except (RuntimeError, ValueError):
        return None


def _watch(rank: int, done: threading.Event) -> None:
    """Exit this process if it keeps waiting for a failed rank, because a device collective would never return."""
    while not done.wait(POLL_SECONDS):
        try:
            if not _store().check([KEY]):
                continue
            first = json.loads(_store().get(KEY))
        except (RuntimeError, ValueError):
            return  # the process that hosted the store has exited
        if first["rank"] == rank or done.wait(GRACE_SECONDS):
            return
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"{FellowFailure.__module__}.{FellowFailure.__name__}: {FellowFailure(**first)}\n")
        sys.stderr.flush()
        os._exit(1)


def _store() -> Any:
    """Return torch's default store, whatever the rendezvous was."""
    return dist.distributed_c10d._get_default_store()

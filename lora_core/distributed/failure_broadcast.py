# pyright: basic
"""What one rank of a trainer fails of, told to the others: they end for that, and not for the silence that follows.

It is told by the store at which the ranks have met, for a rank that fails amid a pass can take no part in what the
others say to each other: those may be waiting for its share of it.
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
LOOK_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""After a failure was told: the system tells a rank that waits for the one that failed sooner, if at all."""


class FellowFailure(RuntimeError):
    """Another rank has failed first; `rank` is which one."""

    def __init__(self, *, rank: int, said: str) -> None:
        super().__init__(f"Rank {rank} failed: {said}")
        self.rank = rank


@contextmanager
def broadcast_failures(ranks: Ranks) -> Iterator[None]:
    """What is raised within on one rank ends all of them. The first raises what it was, the others FellowFailure, where
    the first was not killed before it could tell."""
    if ranks.size == 1:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(ranks.rank, done), name="fellows", daemon=True).start()
    try:
        yield
    except Exception as error:
        first = _tell(ranks.rank, error)
        if first is None or first["rank"] == ranks.rank:
            raise
        raise FellowFailure(**first) from error
    finally:
        done.set()


def _tell(rank: int, error: Exception) -> dict[str, Any] | None:
    """Whose failure was the first; None where nobody can be told any more."""
    said = f"{type(error).__module__}.{type(error).__qualname__}: {error}".removeprefix("builtins.")
    told = json.dumps({"rank": rank, "said": said.partition("\n")[0][:500]})
    try:
        return json.loads(_store().compare_set(KEY, "", told))
    except (RuntimeError, ValueError):
        return None


def _watch(rank: int, done: threading.Event) -> None:
    """End this rank where it waits on for one that has failed: in a collective of a device, no system tells it."""
    while not done.wait(LOOK_SECONDS):
        try:
            if not _store().check([KEY]):
                continue
            first = json.loads(_store().get(KEY))
        except (RuntimeError, ValueError):
            return  # the store has gone, with whoever kept it
        if first["rank"] == rank or done.wait(GRACE_SECONDS):
            return
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"{FellowFailure.__module__}.{FellowFailure.__name__}: {FellowFailure(**first)}\n")
        sys.stderr.flush()
        os._exit(1)


def _store() -> Any:
    """Torch's own, whichever way the ranks have met."""
    return dist.distributed_c10d._get_default_store()

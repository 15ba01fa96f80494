"""When a delivery is tried again: about ten times over a day, further and further apart. Pure."""

from __future__ import annotations

import random

WAITS_SECONDS = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0, 14_400.0, 25_200.0, 36_000.0)
"""After the first try, the second, …: a day and an hour together."""
JITTER = 0.2
LONGEST_ASKED_SECONDS = 12 * 3600.0
"""What a Retry-After can put a try off to."""


def wait_seconds(num_tries: int, *, retry_after: float | None = None, chance: float | None = None) -> float | None:
    """Until the next try after `num_tries` that failed; None: there is none. `chance` is from 0 to 1.

    A Retry-After only makes it longer: it would else be the receiver's way to have many requests sent.
    """
    if not 0 < num_tries <= len(WAITS_SECONDS):
        return None
    spread = 1 + JITTER * (2 * (random.random() if chance is None else chance) - 1)  # noqa: S311  (no secret)
    own = WAITS_SECONDS[num_tries - 1] * spread
    return max(own, min(retry_after or 0.0, LONGEST_ASKED_SECONDS))

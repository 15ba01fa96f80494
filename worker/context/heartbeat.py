"""The worker's heartbeat, on its own threads, so that slow work elsewhere never costs a lease.

A claim that was not renewed for two thirds of its lease is given up: its trainer is killed before the lease expires,
and the claim is reported as stale to its holder. A frozen worker can't do this. Its trainer then exits a lease after
the last heartbeat (confined_child.py). Once recovery has ended its claim, the database refuses the worker's writes
(fencing.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from catalog.clock import boot_seconds
from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.fleet import workers
from catalog.queue import claims
from catalog.queue.claims import ClaimDirectives
from catalog.scheduling.snapshot import USUAL, Policy

log = logging.getLogger(__name__)
WATCH_SECONDS = 0.1


class Heartbeat:
    """Sends heartbeats for one worker and for the claims that it holds."""

    def __init__(
        self,
        db: Database,
        worker_id: str,
        *,
        lease_seconds: float,
        heartbeat_seconds: float,
        policy: Policy = USUAL,
        touched: Path | None = None,
    ) -> None:
        """touched: a file whose age is the time since the last successful heartbeat, for health checks."""
        self._db = db
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._policy = policy
        self._touched = touched
        self._lock = threading.Lock()
        self._renewed_at: dict[str, float] = {}
        self._directives: dict[str, ClaimDirectives] = {}
        self._closed = threading.Event()
        self._beat_now = threading.Event()
        self.drain = False
        """An operator, or an upgraded service, has asked the worker to drain."""
        self.on_drain: Callable[[], None] = lambda: None
        """Called once, when `drain` becomes True."""
        self.lost = threading.Event()
        """Set when claims were given up, until `guard` is called again."""
        self.status: dict[str, Any] = {"resident_base": None, "trainer_id": None, "report": {}}
        self.renewals: list[Callable[[], None]] = []
        """Called after each successful heartbeat, to renew leases of other kinds."""
        self.on_every_beat: Callable[[], None] = lambda: None
        """Called at each heartbeat, even if the database does not answer: for processes without a claim."""
        self.device_use: Callable[[], dict[str, float] | None] = lambda: None
        """Returns the utilization of the device, which each heartbeat reports. It must not block."""
        self._on_beat: Callable[[float], None] | None = None
        self._on_lost: Callable[[], None] | None = None
        self._threads = [
            threading.Thread(target=self._beat_loop, name="heartbeat", daemon=True),
            threading.Thread(target=self._watch_loop, name="heartbeat-watch", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed.set()
        self._beat_now.set()
        for thread in self._threads:
            thread.join(5)

    def guard(self, *, on_beat: Callable[[float], None] | None, on_lost: Callable[[], None] | None) -> None:
        """Call `on_beat` after each successful heartbeat, and `on_lost` when claims are given up.

        `on_beat` receives the `boot_seconds` at which the heartbeat began. The renewed leases last at least
        `lease_seconds` from then.
        """
        self._on_beat, self._on_lost = on_beat, on_lost
        self.lost.clear()

    def hold(self, claim_ids: Iterable[str], *, since: float) -> None:
        """Renew these claims from now on. since: a value of `boot_seconds` from a time before they were claimed."""
        with self._lock:
            self._renewed_at |= dict.fromkeys(claim_ids, since)

    def release(self, claim_id: str) -> None:
        with self._lock:
            self._renewed_at.pop(claim_id, None)
            self._directives.pop(claim_id, None)

    def release_all(self) -> None:
        """Renew no lease any more: all remaining claims expire."""
        self.renewals.clear()
        with self._lock:
            self._renewed_at.clear()
            self._directives.clear()

    def take_directives(self, claim_ids: Collection[str]) -> dict[str, ClaimDirectives]:
        """Return, once each, the directives of the last heartbeats for these claims. Claims that were given up are
        stale."""
        with self._lock:
            return {claim_id: self._directives.pop(claim_id) for claim_id in claim_ids if claim_id in self._directives}

    def beat(self) -> None:
        """Send one heartbeat. Raises Unavailable if the database does not answer."""
        began = boot_seconds()
        self.on_every_beat()
        with self._lock:
            held = list(self._renewed_at)
        directives = workers.worker_beat(self._db, self._worker_id, **self._status())
        if self._touched is not None:
            with suppress(OSError):  # a full or read-only disk must not cost the leases
                self._touched.touch()
        if directives.drain and not self.drain:
            self.drain = True
            self.on_drain()
        if held:
            self._note(claims.heartbeat(self._db, **self._renewal(held)), began)
        if self._on_beat is not None:
            self._on_beat(began)
        for renew in tuple(self.renewals):
            renew()

    def _status(self) -> dict[str, Any]:
        use = self.device_use()
        return self.status if use is None else {**self.status, "report": {**self.status["report"], "device": use}}

    def _renewal(self, held: list[str]) -> dict[str, Any]:
        terms = {"lease_seconds": self._lease_seconds, "policy": self._policy}
        return {"worker_id": self._worker_id, "claim_ids": held, **terms}

    def _note(self, answers: dict[str, ClaimDirectives], began: float) -> None:
        with self._lock:
            for claim_id, directive in answers.items():
                if claim_id not in self._renewed_at:
                    continue
                if directive.stale:
                    del self._renewed_at[claim_id]
                else:
                    self._renewed_at[claim_id] = began
                self._directives[claim_id] = directive

    def _beat_loop(self) -> None:
        while not self._closed.is_set():
            try:
                self.beat()
                pause = self._heartbeat_seconds
            except LorryError as error:
                log.warning("No heartbeat: %s", error)
                pause = min(1.0, self._heartbeat_seconds)
            except Exception:  # the next heartbeat may succeed, and without heartbeats every claim expires
                log.exception("No heartbeat")
                pause = min(1.0, self._heartbeat_seconds)
            self._beat_now.wait(pause)
            self._beat_now.clear()

    def _watch_loop(self) -> None:
        while not self._closed.wait(min(WATCH_SECONDS, self._lease_seconds / 20)):
            try:
                self.abandon_overdue()
            except Exception:  # without the next check, two workers might train one job
                log.exception("Checking for overdue claims failed")

    def abandon_overdue(self) -> None:
        """Give up the claims that were not renewed for too long. No heartbeat renews them any more."""
        limit = boot_seconds() - self._lease_seconds * 2 / 3
        with self._lock:
            overdue = [claim_id for claim_id, renewed_at in self._renewed_at.items() if renewed_at < limit]
            for claim_id in overdue:
                del self._renewed_at[claim_id]
                self._directives[claim_id] = ClaimDirectives(stale=True)
        if not overdue:
            return
        log.error("No heartbeat for two thirds of a lease: %d claims are given up.", len(overdue))
        self.lost.set()
        if self._on_lost is not None:
            self._on_lost()

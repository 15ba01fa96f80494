"""The inference requests that a trainer of this worker answers: it claims them, hands them over, and sends the answers
to the API processes that wait."""

from __future__ import annotations

import logging
import math
import queue
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress

from catalog.errors import LorryError, OutOfSpace, Unavailable
from catalog.inference import claims
from catalog.inference.claims import InferenceClaim
from catalog.storage.manifest import DamagedArtifact
from catalog.tables.table import Json
from worker.context.context import WorkerContext
from worker.protocol.errors import described
from worker.protocol.mailbox import InboxWriter, StagedAdapter, TrainerDirectory
from worker.session.reply_connections import ReplyConnections

MAX_OPEN = 256
"""Number of unfinished answers from which on a trainer claims no more requests."""
MAX_BATCH_OPEN = MAX_OPEN // 2
"""The same for answers of batches."""
MAX_WAITING = 32
"""Number of answers without a first token from which on a trainer claims no more requests; separately for batches. The
other requests wait in the database, where the projects take turns."""
POLL_SECONDS = 0.25
"""Interval at which a loaded trainer polls for requests, if nothing notifies it."""
RETRY_SECONDS = 5.0
"""Pause after which a trainer's directory gets an adapter that could not be copied."""
STAGED_ADAPTERS = 128
"""Maximum number of adapters in a trainer's directory."""
log = logging.getLogger(__name__)


class _NotCopied(Exception):
    """An adapter can't be copied to the trainer's directory now. `__cause__` is the error."""


class InferenceSession:
    """The requests of one trainer."""

    def __init__(self, context: WorkerContext, pack_key: str) -> None:
        self._context = context
        self._pack_key = pack_key
        self._connections = ReplyConnections()
        self._open: dict[str, InferenceClaim] = {}
        """By the ids of the claims."""
        self._begun: dict[str, set[int]] = {}
        """Indices of the answers that have begun, by the ids of the claims."""
        self._complete: dict[str, set[int]] = {}
        """Indices of the answers that are complete, by the ids of the claims."""
        self._has_more = False
        """The last claim reached its limit, so more requests may wait."""
        self._unsent: list[InferenceClaim] = []
        """Claimed, but not yet given to the trainer."""
        self._stale: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Claims that are no longer valid."""
        self._staged: OrderedDict[str, str] = OrderedDict()
        self._retry_at: dict[str, float] = {}
        """When to copy an adapter again, by its digest and the monotonic clock."""
        self.ready_at: float | None = None
        """When the trainer had loaded its base model, by the monotonic clock."""
        self.is_yielding = False
        """The trainer claims nothing, because requests for another base model wait."""
        self._polled_at = time.monotonic()
        self._is_closing = False
        self.last_answer_at = self.last_client_at = -math.inf
        """When the trainer last had a request, and one of a client that waits, by the monotonic clock."""
        context.heartbeat.renewals.append(self.renew)

    @property
    def has_clients(self) -> bool:
        """Whether it holds requests of clients that wait. Those whose adapter can't be copied now don't count."""
        delayed = self._delayed()
        return any(not each.is_batch and each.claim_id not in delayed for each in self._open.values())

    @property
    def is_idle(self) -> bool:
        return not self._open

    def reserve(self) -> bool:
        """Claim one request before the base model is loaded for it, so that no other worker loads it as well.

        Returns False if there is none that can be answered. Raises Unavailable.
        """
        found = claims.reserve(
            self._context.db,
            worker_id=self._context.worker_id,
            pack_key=self._pack_key,
            lease_seconds=self._context.settings.lease_seconds,
        )
        self._hold([] if found is None else [found])
        return bool(self._unsent)

    def claim(self) -> None:
        """Claim requests that wait for this trainer's base model. Raises Unavailable."""
        of_batches = [each for each in self._open.values() if each.is_batch]
        others = [each for each in self._open.values() if not each.is_batch]
        num_of_batches = self._num_incomplete(of_batches)
        limit = min(MAX_OPEN - num_of_batches - self._num_incomplete(others), MAX_WAITING - self._num_waiting(others))
        batch_limit = min(MAX_BATCH_OPEN - num_of_batches, MAX_WAITING - self._num_waiting(of_batches))
        if self._is_closing or self.is_yielding or limit <= 0:
            return
        found = claims.claim(
            self._context.db,
            worker_id=self._context.worker_id,
            pack_key=self._pack_key,
            limit=limit,
            batch_limit=batch_limit,
            lease_seconds=self._context.settings.lease_seconds,
        )
        self._has_more = _num_answers(found) >= min(limit, max(1, batch_limit))
        again = {claimed.request_id for claimed in found}  # if the lease of an open claim had expired
        for claimed in self._open.values():
            if claimed.request_id in again:
                self._stale.put(claimed.claim_id)
        self._hold(found)

    def _hold(self, found: Iterable[InferenceClaim]) -> None:
        """Keep new claims until the trainer gets them. A request that can't be read is answered with an error."""
        for claimed in found:
            self._open[claimed.claim_id] = claimed
            if claimed.body is None:
                self._fail(claimed, claims.UNPROCESSABLE)
            else:
                self._unsent.append(claimed)

    def renew(self) -> None:
        """Extend the leases. The heartbeat's thread calls it, so that slow work here, such as storing a checkpoint,
        costs no lease. Raises Unavailable."""
        lease_seconds = self._context.settings.lease_seconds
        for claim_id in claims.renew(self._context.db, list(self._open), lease_seconds=lease_seconds):
            self._stale.put(claim_id)

    def advance(
        self, directory: TrainerDirectory, inbox: InboxWriter, *, is_ready: bool, has_suspect: bool, was_notified: bool
    ) -> None:
        """Stop abandoned requests. If the trainer is ready, claim new ones and give them to it.

        has_suspect: the trainer holds a job that must train alone, so no request joins it.

        Raises Unavailable and OutOfSpace.
        """
        now = time.monotonic()
        if is_ready and self.ready_at is None:
            self.ready_at = now
        abandoned, unreachable = self._connections.stopped(), self._connections.failed()
        self._stop((each for each in self._open.values() if each.request_id in abandoned), inbox)
        self._stop((each for each in self._open.values() if each.reply_to in unreachable), inbox)
        if is_ready and not has_suspect and (was_notified or self._is_due(now)):
            self._polled_at = now
            self.claim()
        stale = set(self._now_stale())
        self._stop((each for each in self._open.values() if each.claim_id in stale), inbox)
        if self._open:
            self.last_answer_at = now
        if self.has_clients:
            self.last_client_at = now
        if is_ready:
            self._hand_over_all(directory, inbox)

    def receive(self, event: Json) -> None:
        """Send an event of the trainer to the API process that waits for it."""
        claimed = self._open.get(event["claim_id"])
        if claimed is None:
            return
        self._send(claimed, event)
        deltas: list[Json] = event.get("deltas", [])
        self._begun.setdefault(claimed.claim_id, set()).update(delta["index"] for delta in deltas)
        ended = (delta["index"] for delta in deltas if delta.get("finish") is not None)
        self._complete.setdefault(claimed.claim_id, set()).update(ended)
        if event["type"] in ("answered", "unanswered"):
            self._forget(claimed)

    def fail_all(self, error: Json) -> None:
        """Answer all requests with an error: the base model can't be loaded."""
        for claimed in list(self._open.values()):
            self._fail(claimed, error)
        self._unsent.clear()

    def stop_claiming(self) -> None:
        """Claim no more requests, because the trainer is to be unloaded."""
        self._is_closing = True

    def give_back(self) -> None:
        """Release the requests of a trainer that is not launched. It counts for none of them."""
        self.stop_claiming()
        self.release_all()

    def release_all(self) -> None:
        """Let other workers answer what this trainer has not answered, and close the connections.

        A request that MAX_CLAIMS workers could not answer fails. A request that a ready trainer has not got is not
        counted: it can be the cause only if the trainer failed while it loaded.
        """
        with suppress(ValueError):  # it was already released
            self._context.heartbeat.renewals.remove(self.renew)
        is_failure = not (self._is_closing or self._context.draining)
        if self.ready_at is not None:
            self._release(self._unsent, counts=False)
            for claimed in self._unsent:
                self._forget(claimed)
        for claimed in [claimed for claimed in self._open.values() if claimed.is_last and is_failure]:
            self._fail(claimed, claims.FAILED)
        self._release(list(self._open.values()), counts=is_failure)
        self._open.clear()
        self._begun.clear()
        self._complete.clear()
        self._unsent.clear()
        self._connections.close()

    def _is_due(self, now: float) -> bool:
        """Return whether to poll for requests: at intervals, or at once if more may wait and the trainer has begun most
        of the answers that it has."""
        is_short = self._has_more and self._num_waiting(self._open.values()) <= MAX_WAITING // 2
        return is_short or now - self._polled_at >= POLL_SECONDS

    def _num_waiting(self, claimed: Iterable[InferenceClaim]) -> int:
        """Return the number of answers to these requests that the trainer has to begin. Those whose adapter can't be
        copied now don't count."""
        delayed = self._delayed()
        return sum(
            each.num_answers - len(self._begun.get(each.claim_id, ()))
            for each in claimed
            if each.claim_id not in delayed
        )

    def _delayed(self) -> set[str]:
        """Return the claims of requests whose adapter can't be copied now."""
        return {each.claim_id for each in self._unsent if each.adapter in self._retry_at}

    def _num_incomplete(self, claimed: Iterable[InferenceClaim]) -> int:
        return sum(each.num_answers - len(self._complete.get(each.claim_id, ())) for each in claimed)

    def _forget(self, claimed: InferenceClaim) -> None:
        del self._open[claimed.claim_id]
        self._begun.pop(claimed.claim_id, None)
        self._complete.pop(claimed.claim_id, None)

    def _hand_over_all(self, directory: TrainerDirectory, inbox: InboxWriter) -> None:
        """Give the claimed requests to the trainer. An adapter that can't be copied now delays only its own requests.
        After the first such adapter, others that are not in the trainer's directory wait for the next call."""
        is_outage = False
        for claimed in list(self._unsent):
            digest = claimed.adapter or ""
            is_here = not digest or digest in self._staged
            if not is_here and (is_outage or time.monotonic() < self._retry_at.get(digest, 0.0)):
                continue
            try:
                self._hand_over(claimed, directory, inbox)
            except _NotCopied as error:
                log.warning("Adapter %s was not copied. It is copied later. %s", digest, error.__cause__)
                self._retry_at[digest] = time.monotonic() + RETRY_SECONDS
                is_outage = True
                continue
            except (RecursionError, TypeError, ValueError):  # such a body must not end the worker, and all its jobs
                log.exception("Request %s can't be passed to the trainer.", claimed.request_id)
                self._fail(claimed, claims.UNPROCESSABLE)
            self._unsent.remove(claimed)
            self._retry_at.pop(digest, None)

    def _hand_over(self, claimed: InferenceClaim, directory: TrainerDirectory, inbox: InboxWriter) -> None:
        """Give a request to the trainer, or else answer or release it. Raises _NotCopied, and OutOfSpace and OSError if
        no message can be sent now."""
        try:
            adapter = self._stage(claimed.adapter, directory)
        except DamagedArtifact as error:
            self._refuse(claimed, error)
            return
        except OutOfSpace as error:
            log.warning("Request %s is left to another worker. %s", claimed.request_id, error)
            if claimed.is_last:
                self._refuse(claimed, error)
            else:
                self._forget(claimed)
                self._release([claimed], counts=True)
            return
        except (Unavailable, OSError) as error:
            raise _NotCopied from error
        assert claimed.body is not None, "`_hold` has answered it"
        body = {**claimed.body, "is_batch": True} if claimed.is_batch else claimed.body
        inbox.send("answer", claim_id=claimed.claim_id, adapter=adapter, **body)

    def _refuse(self, claimed: InferenceClaim, error: LorryError) -> None:
        self._fail(claimed, described(error))

    def _fail(self, claimed: InferenceClaim, error: Json) -> None:
        self.receive({"type": "unanswered", "claim_id": claimed.claim_id, "error": error})

    def _stage(self, digest: str | None, directory: TrainerDirectory) -> StagedAdapter | None:
        """Copy an adapter to the trainer's directory, unless it is there. Raises DamagedArtifact, OutOfSpace,
        Unavailable."""
        if digest is None:
            return None
        folder = directory.path / "adapters" / digest
        if digest not in self._staged:
            shutil.rmtree(folder, ignore_errors=True)
            self._context.store.fetch(self._context.store.get_manifest(digest), folder)
            self._staged[digest] = directory.named(folder)
            in_use = {claimed.adapter for claimed in self._open.values()}
            unused = [staged for staged in self._staged if staged not in in_use]
            for oldest in unused[: max(0, len(self._staged) - STAGED_ADAPTERS)]:
                del self._staged[oldest]
                shutil.rmtree(directory.path / "adapters" / oldest, ignore_errors=True)
        self._staged.move_to_end(digest)
        return {"digest": digest, "folder": self._staged[digest]}

    def _now_stale(self) -> Iterator[str]:
        with suppress(queue.Empty):
            while True:
                yield self._stale.get_nowait()

    def _stop(self, claimed: Iterable[InferenceClaim], inbox: InboxWriter) -> None:
        """Stop answering requests that were answered elsewhere, that their client has abandoned, or whose API process
        can't be reached.

        An API process that still runs releases its requests when it loses the connection. Otherwise their leases
        expire. It deletes them after MAX_CLAIMS.
        """
        for each in list(claimed):
            self._forget(each)
            if each in self._unsent:
                self._unsent.remove(each)
            else:
                inbox.send("stop_answering", claim_id=each.claim_id)

    def _release(self, claimed: list[InferenceClaim], *, counts: bool) -> None:
        try:
            claims.release(self._context.db, [each.claim_id for each in claimed], counts=counts)
        except LorryError as error:  # their leases expire
            log.warning("Inference requests were not released: %s", error)

    def _send(self, claimed: InferenceClaim, event: Json) -> None:
        sent = {name: value for name, value in event.items() if name not in ("claim_id", "seconds")}
        self._connections.send(claimed.reply_to, request_id=claimed.request_id, claim_id=claimed.claim_id, event=sent)


def _num_answers(claimed: Iterable[InferenceClaim]) -> int:
    return sum(each.num_answers for each in claimed)

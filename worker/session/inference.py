"""The inference requests that a trainer of this worker answers: it claims them, hands them over, and sends the answers
to the API processes that wait."""

from __future__ import annotations

import logging
import shutil
import time
from collections import OrderedDict

from catalog.clock import boot_seconds
from catalog.errors import LorryError
from catalog.inference import claims
from catalog.inference.claims import InferenceClaim
from catalog.storage.manifest import DamagedArtifact
from catalog.tables.table import Json
from worker.context.context import WorkerContext
from worker.protocol.mailbox import InboxWriter, StagedAdapter, TrainerDirectory
from worker.session.reply_connections import ReplyConnections

MAX_OPEN = 256
"""Maximum number of requests that one trainer answers at the same time."""
MAX_BATCH_OPEN = MAX_OPEN // 2
"""Maximum number of them that belong to batches."""
POLL_SECONDS = 0.25
"""Interval at which a loaded trainer polls for requests, if nothing notifies it."""
STAGED_ADAPTERS = 128
"""Maximum number of adapters in a trainer's directory."""
log = logging.getLogger(__name__)


class InferenceSession:
    """The requests of one trainer."""

    def __init__(self, context: WorkerContext, pack_key: str) -> None:
        self._context = context
        self._pack_key = pack_key
        self._connections = ReplyConnections()
        self._open: dict[str, InferenceClaim] = {}
        self._unsent: list[InferenceClaim] = []
        """Claimed, but not yet given to the trainer."""
        self._restarting: set[str] = set()
        """Requests that were claimed again: events of the earlier claim are ignored."""
        self._staged: OrderedDict[str, str] = OrderedDict()
        self._polled_at, self._renewed_at = time.monotonic(), boot_seconds()
        self._is_closing = False
        self.last_answer_at = -1.0
        """When the trainer last had a request, by the monotonic clock."""

    @property
    def is_idle(self) -> bool:
        return not self._open

    def claim(self, *, limit: int = MAX_OPEN) -> None:
        """Claim requests that wait for this trainer's base model. Raises Unavailable."""
        if self._is_closing or len(self._open) >= limit:
            return
        found = claims.claim(
            self._context.db,
            worker_id=self._context.worker_id,
            pack_key=self._pack_key,
            limit=limit - len(self._open),
            batch_limit=MAX_BATCH_OPEN - sum(claimed.is_batch for claimed in self._open.values()),
            lease_seconds=self._context.settings.lease_seconds,
        )
        for claimed in found:
            if claimed.request_id in self._open:  # its lease had expired
                self._unsent = [other for other in self._unsent if other.request_id != claimed.request_id]
                self._restarting.add(claimed.request_id)
            self._open[claimed.request_id] = claimed
            self._unsent.append(claimed)

    def advance(self, directory: TrainerDirectory, inbox: InboxWriter, *, is_ready: bool, was_notified: bool) -> None:
        """Renew leases, and stop abandoned requests. If the trainer is ready, claim new ones and give them to it.

        Raises Unavailable and OutOfSpace.
        """
        now = time.monotonic()
        self._stop(self._connections.stopped(), inbox)
        self._drop(self._connections.failed(), inbox)
        began = boot_seconds()
        if began - self._renewed_at >= self._context.settings.lease_seconds / 4:
            self._renew(inbox)
            self._renewed_at = began
        if is_ready and (was_notified or now - self._polled_at >= POLL_SECONDS):
            self._polled_at = now
            self.claim()
        if self._open:
            self.last_answer_at = now
        while self._unsent and is_ready:
            self._hand_over(self._unsent[0], directory, inbox)
            del self._unsent[0]

    def receive(self, event: Json) -> None:
        """Send an event of the trainer to the API process that waits for it."""
        claimed = self._open.get(event["request_id"])
        if event["type"] in ("answering", "unanswered"):
            self._restarting.discard(event["request_id"])
        if claimed is None or claimed.request_id in self._restarting:
            return
        self._send(claimed, event)
        if event["type"] in ("answered", "unanswered"):
            del self._open[claimed.request_id]

    def fail_all(self, error: Json) -> None:
        """Answer all requests with an error: the base model can't be loaded."""
        for claimed in list(self._open.values()):
            self.receive({"type": "unanswered", "request_id": claimed.request_id, "error": error})
        self._unsent.clear()

    def stop_claiming(self) -> None:
        """Claim no more requests, because the trainer is to be unloaded."""
        self._is_closing = True

    def release_all(self) -> None:
        """Let other workers answer what this trainer has not answered, and close the connections.

        A request that MAX_CLAIMS workers could not answer fails.
        """
        is_failure = not (self._is_closing or self._context.draining)
        for claimed in [claimed for claimed in self._open.values() if claimed.is_last and is_failure]:
            self.receive({"type": "unanswered", "request_id": claimed.request_id, "error": claims.FAILED})
        self._release(list(self._open.values()), counts=is_failure)
        self._open.clear()
        self._unsent.clear()
        self._connections.close()

    def _hand_over(self, claimed: InferenceClaim, directory: TrainerDirectory, inbox: InboxWriter) -> None:
        if claimed.request_id not in self._open:
            return
        try:
            adapter = self._stage(claimed.adapter, directory)
        except DamagedArtifact as error:
            body = {"code": error.code, "message": error.message, "remedy": error.remedy}
            self.receive({"type": "unanswered", "request_id": claimed.request_id, "error": body})
            return
        body = {**claimed.body, "is_batch": True} if claimed.is_batch else claimed.body
        inbox.send("answer", request_id=claimed.request_id, adapter=adapter, **body)

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

    def _renew(self, inbox: InboxWriter) -> None:
        held = {claimed.claim_id: ident for ident, claimed in self._open.items()}
        stale = claims.renew(self._context.db, held, lease_seconds=self._context.settings.lease_seconds)
        self._stop({held[claim_id] for claim_id in stale}, inbox)

    def _stop(self, request_ids: set[str], inbox: InboxWriter) -> None:
        """Stop answering requests that were answered elsewhere, or abandoned by their client."""
        for request_id in request_ids & self._open.keys():
            del self._open[request_id]
            inbox.send("stop_answering", request_id=request_id)

    def _drop(self, addresses: set[str], inbox: InboxWriter) -> None:
        """Stop answering the requests of API processes that no longer receive answers.

        An API process that still runs releases them when it loses the connection. Otherwise their leases expire. An API
        process deletes them after MAX_CLAIMS.
        """
        dropped = [claimed for claimed in self._open.values() if claimed.reply_to in addresses]
        self._stop({claimed.request_id for claimed in dropped}, inbox)

    def _release(self, claimed: list[InferenceClaim], *, counts: bool) -> None:
        try:
            claims.release(self._context.db, [each.claim_id for each in claimed], counts=counts)
        except LorryError as error:  # their leases expire
            log.warning("Inference requests were not released: %s", error)

    def _send(self, claimed: InferenceClaim, event: Json) -> None:
        sent = {name: value for name, value in event.items() if name not in ("request_id", "seconds")}
        self._connections.send(claimed.reply_to, request_id=claimed.request_id, claim_id=claimed.claim_id, event=sent)

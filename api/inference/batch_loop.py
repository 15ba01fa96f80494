"""Works on batches: claims them, validates their inputs, answers their lines, and writes their files.

Every API server runs this loop; they share the batches by leases (batch_lease.py). The result of each line is stored
when it is complete (batch_lines.py). After a crash or a lost lease, another process continues with the lines that have
no result.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial

from api.background.task_loop import TaskLoop
from api.inference.batch_input import InputCheck, lines_of
from api.inference.batch_lease import LeasedBatch, Threads
from api.inference.batch_lines import BatchLines
from api.inference.batch_output import UNANSWERED, OutputFiles
from api.inference.exchange import Engines
from catalog.batches import execution
from catalog.batches.execution import BatchClaim, Outcome
from catalog.db.database import Database
from catalog.errors import LorryError, StaleClaim
from catalog.settings import Settings
from catalog.storage.manifest import DamagedArtifact
from catalog.storage.store import ArtifactStore
from catalog.tables.table import Json

LOOK_SECONDS = 1.0
"""Interval at which the loop polls for batches."""
MAX_BATCHES = 4
"""Batches that one process works on at the same time."""
log = logging.getLogger("lorry.api")


class BatchRunner(TaskLoop[BatchClaim]):
    def __init__(self, db: Database, store: ArtifactStore, settings: Settings, engines: Engines) -> None:
        super().__init__("batches")
        self._db, self._store, self._settings, self._engines = db, store, settings, engines

    @property
    def most(self) -> int:
        return MAX_BATCHES

    @property
    def look_seconds(self) -> float:
        return LOOK_SECONDS

    async def run(self) -> None:
        self._threads = Threads()  # in the event loop that uses it
        await super().run()

    async def claim(self) -> BatchClaim | None:
        return await self._threads.run(partial(execution.claim, self._db))

    async def work(self, claimed: BatchClaim) -> None:
        """Work on a batch until it has ended, its turn is over or its lease is lost. A batch whose processing crashes
        keeps its lease, so that it is tried again only after some time."""
        threads = self._threads
        is_to_release = True
        try:
            directive = await threads.run(partial(execution.renew, self._db, claimed))
            batch = LeasedBatch(db=self._db, claimed=claimed, directive=directive, threads=threads)
            batch.follow(directive)
            await self._keep_and_advance(batch)
            is_to_release = not batch.has_crashed
        except StaleClaim:
            is_to_release = False
        except LorryError as error:
            log.warning("batch=%s code=%s: %s", claimed.batch_id, error.code, error)
        except Exception:
            log.exception("crash in the batch %s", claimed.batch_id)
            is_to_release = False
        finally:
            if is_to_release:
                with suppress(LorryError, StaleClaim):  # its lease expires
                    await threads.run(partial(execution.release, self._db, claimed))

    async def _keep_and_advance(self, batch: LeasedBatch) -> None:
        """Renew the lease of the batch until its lines are stopped."""
        lines = BatchLines(batch, self._store, self._engines, max_line_bytes=self._settings.max_line_bytes)
        keeper = asyncio.create_task(batch.keep())
        try:
            await self._advance(batch, lines)
        finally:
            batch.stopping.set()
            keeper.cancel()
            await lines.stop()

    async def _advance(self, batch: LeasedBatch, lines: BatchLines) -> None:
        """Do what the batch needs next: validate its input, answer its lines, write its files."""
        try:
            if batch.directive.status == "validating" and not await self._validate(batch, lines):
                return
            if not batch.stopping.is_set() and not await lines.answer_all():
                return  # others continue
            if batch.is_lost or batch.has_crashed:
                return
            await batch.persist(partial(execution.finalize, self._db, batch.claimed))
            await batch.persist(partial(self._end, batch))
        except DamagedArtifact as error:
            await self._end_without_input(batch, lines, error)
        with suppress(LorryError):  # garbage collection deletes the rest
            while await batch.threads.run(partial(execution.delete_results, self._db)):
                pass

    async def _end_without_input(self, batch: LeasedBatch, lines: BatchLines, error: DamagedArtifact) -> None:
        """Fail the batch, because its input can't be read. The results so far are in its files."""
        log.warning("batch=%s code=%s: %s", batch.claimed.batch_id, error.code, error)
        batch.stopping.set()
        await lines.settle()
        if batch.is_lost or batch.has_crashed:
            return
        await batch.persist(partial(execution.finalize, self._db, batch.claimed))
        await batch.persist(partial(self._end, batch, damage=error))

    async def _validate(self, batch: LeasedBatch, lines: BatchLines) -> bool:
        """Validate all lines. Returns False if the batch has failed."""
        check = InputCheck(
            db=self._db,
            project_id=batch.claimed.project_id,
            endpoint=batch.claimed.endpoint,
            max_line_bytes=self._settings.max_line_bytes,
        )

        def check_some() -> bool:
            some = following()
            for number, line in some:
                if not check.is_over:
                    check.add(number, line)
            return bool(some) and not check.is_over

        following = await batch.threads.run(lines.read)
        while not batch.stopping.is_set() and await batch.threads.run(check_some):
            pass
        if batch.stopping.is_set():
            return True
        check.end()
        given = {"num_lines": check.num_lines}
        if check.errors:
            await batch.persist(partial(execution.fail, self._db, batch.claimed, check.errors, **given))
            return False
        await batch.persist(partial(execution.begin, self._db, batch.claimed, **given))
        batch.follow(await batch.persist(partial(execution.renew, self._db, batch.claimed)))
        return True

    def _end(self, batch: LeasedBatch, *, damage: DamagedArtifact | None = None) -> None:
        """Write and store the files, and end the batch.

        damage: why the input can't be read. Then the lines without a result are in no file, because their ids are
        unknown. Raises StaleClaim, DamagedArtifact, Unavailable, OutOfSpace.
        """
        directive = execution.renew(self._db, batch.claimed)
        num_finished = len(execution.finished_lines(self._db, batch.claimed.batch_id))
        is_complete = 0 < num_finished == directive.num_lines
        outcome: Outcome = "completed" if is_complete else "expired"
        if directive.status == "cancelling":
            outcome = "cancelled"
        error: Json | None = None
        if damage is not None and not is_complete:
            outcome, error = "failed", _damaged(damage, num_finished=num_finished, num_lines=directive.num_lines)
        with OutputFiles(self._settings.data_dir / "spool", batch.claimed.task.claim_id) as files:
            if is_complete or error is not None:
                files.write_results(self._db, batch.claimed.batch_id)
            elif directive.num_lines:
                inputs = lines_of(
                    self._store.open_blob(batch.claimed.input_digest), max_line_bytes=self._settings.max_line_bytes
                )
                files.write(self._db, batch.claimed.batch_id, inputs, unanswered=UNANSWERED[outcome])
            output, failures = files.stored(self._store)
        execution.end(self._db, batch.claimed, outcome, output=output, failures=failures, error=error)


def _damaged(damage: DamagedArtifact, *, num_finished: int, num_lines: int) -> Json:
    """Return the error of a batch whose input can't be read."""
    message = damage.sentence()
    if num_lines:
        message = f"{message} {num_finished} of the {num_lines} requests were answered before."
    return {"code": damage.code, "message": message, "param": "input_file_id", "line": None}

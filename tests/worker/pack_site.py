"""A worker without processes: a real catalog, a real store, and a trainer's directory. The test is the trainer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from catalog.db.database import Database
from catalog.error_texts import ErrorText
from catalog.errors import Unavailable
from catalog.history.queries import attempts
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.queue.claims import ClaimDirectives
from catalog.queue.notifier import FileNotifier
from catalog.scheduling.snapshot import Capacity
from catalog.settings import Settings
from catalog.states import EndReason
from catalog.storage.store import open_store
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from tests.catalog.prepared_data import REPORT
from tests.catalog.world import DESCRIPTION, WIDE, Clock, World
from worker.context.context import WorkerContext
from worker.context.heartbeat import Heartbeat
from worker.inference.server import InferenceServer
from worker.node import devices
from worker.protocol.mailbox import EventReader, EventWriter, InboxReader, TrainerDirectory
from worker.session.trainer_session import TrainerSession

READY = {
    "type": "ready",
    "memory": {"base_bytes": 1, "adapter_bytes": 0, "peak_bytes": 1},
    "invariance": "bitwise",
    "versions": {"lorry": "1"},
}
PASSED = {"max_abs_diff": 0.0, "tolerance": 0.1, "passed": True}
OUTAGE = Unavailable(ErrorText(code="store_unavailable", message="The store does not answer.", remedy="Wait."))


class PackSite:
    """The worker's site. `emit` writes events as the trainer, and `received_verbs` reads its inbox."""

    def __init__(self, folder: Path, database_path: Path) -> None:
        self.folder = folder
        self.settings = Settings(data_dir=folder, poll_seconds=0.001)
        clock = Clock()
        self.db = Database(f"sqlite:///{database_path}", clock=clock)
        self.world = World(self.db, clock)
        self.world.worker("w1")
        self.store = open_store(self.settings)
        heartbeat = Heartbeat(self.db, "w1", lease_seconds=60, heartbeat_seconds=60)
        self.context = WorkerContext(
            settings=self.settings,
            db=self.db,
            store=self.store,
            worker_id="w1",
            device=devices.cpu(),
            heartbeat=heartbeat,
            inference_server=_server(),
            notifier=FileNotifier(self.settings.notification_path()),
        )
        self.context.trainers_dir().mkdir(parents=True)
        self.context.scratch_dir().mkdir(parents=True)
        self.tokens = self.files("tokens", "tokens.safetensors", "the tokens")

    def files(self, folder: str, name: str, content: str) -> Path:
        path = self.folder / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
        return path

    def queued(self, **fields: Any) -> Job:
        """Return a job whose tokens are in the store."""
        job = self.world.queued(**fields)
        manifest = self.store.put_folder(self.tokens, kind="tokens")
        stored: dict[str, Any] = {"project_id": job.project_id, "artifact": manifest, "report": REPORT}
        for key in filter(None, (job.train_prepared, job.valid_prepared)):
            self.world.put_tokens(key, file_digest="0" * 64, **stored)
        return job

    def claim_all(self, trainer_id: str = "trainer-1", capacity: Capacity = WIDE) -> list[Claim]:
        found = self.world.claim("w1", capacity, trainer_id=trainer_id)
        self.context.heartbeat.hold((claim.claim_id for claim in found), since=float("inf"))
        return found

    def claim(self, **fields: Any) -> Claim:
        self.queued(**fields)
        (claim,) = self.claim_all()
        return claim

    def claim_with_checkpoints(self, *steps: int) -> Claim:
        """Return the second attempt of a job that has checkpoints of these steps."""
        first = self.claim()
        for step in steps:
            manifest = self.store.put_folder(self.files(f"saved-{step}", "row", f"step {step}"), kind="checkpoint")
            recording.record_checkpoint(self.db, first.claim_id, step=step, artifact=manifest)
        claims.end(self.db, first.claim_id, reason=EndReason.DRAINED, detail="")
        (second,) = self.claim_all()
        return second

    def session(
        self, *claimed: Claim, trainer_id: str = "trainer-1", invariance: str = "bitwise", from_step: int = 0
    ) -> TrainerSession:
        """Return a session whose trainer is ready and has admitted these claims."""
        session = self.loading_session(*claimed, trainer_id=trainer_id)
        emit(session, READY | {"invariance": invariance})
        for claim in claimed:
            emit_for(session, claim, "admitted", step=from_step, num_steps=10, num_parameters=1, steps_per_epoch=2.5)
        session.read_events()
        received_verbs(session)
        return session

    def loading_session(self, *claimed: Claim, trainer_id: str = "trainer-1") -> TrainerSession:
        directory = TrainerDirectory.create(self.context.trainers_dir() / trainer_id, {})
        pack_key = claimed[0].job.pack_key if claimed else "base:float32:causal-lm"
        session = TrainerSession(self.context, trainer_id, directory, pack_key, description=DESCRIPTION)
        for claim in claimed:
            session.admit(claim)
        session.hand_over()
        return session

    def checkpoint(self, session: TrainerSession, claim: Claim, step: int) -> str:
        """Write a checkpoint as the trainer does. Return its folder relative to the trainer's directory."""
        folder = session.directory.checkpoint_path(claim.claim_id, step)
        folder.mkdir(parents=True)
        (folder / "row").write_text(f"{claim.claim_id} at step {step}")
        return session.directory.named(folder)

    def exported(self, session: TrainerSession, claim: Claim, step: int) -> dict[str, Any]:
        """Write a checkpoint and its adapter. Return the body of the trainer's event about them."""
        folder = session.directory.path / self.checkpoint(session, claim, step)
        adapter = folder.with_name(f"step-{step}-adapter")
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_text(f"weights of step {step}")
        folders = {"folder": folder, "adapter": adapter}
        named = {name: str(path.relative_to(session.directory.path)) for name, path in folders.items()}
        return {"step": step, **named, "num_parameters": 24}

    def checkpoints(self, claim: Claim) -> list[Checkpoint]:
        with self.db.read() as session:
            rows = session.query(Checkpoint).where(Checkpoint.job_id == claim.job.id)
            return sorted(rows, key=lambda row: row.step)

    def reason(self, claim: Claim) -> str | None:
        """Return the end reason of the claim's attempt."""
        found = attempts(self.db, **self.world.of(claim.job.id))
        return next(attempt.reason for attempt in found if attempt.claim_id == claim.claim_id)

    def held(self) -> set[str]:
        """Return the claims whose leases are renewed."""
        return set(self.context.heartbeat._renewed_at)


@cache
def _server() -> InferenceServer:
    """Return the server of all sites of this process, which serves the session that was opened last."""
    server = InferenceServer(Settings())
    server.start()
    return server


@contextmanager
def pack_site(folder: Path, migrated_database: Path) -> Iterator[PackSite]:
    """Yield a site in `folder`, on a copy of the database."""
    path = folder / "lorry.db"
    shutil.copy(migrated_database, path)
    site = PackSite(folder / "data", path)
    try:
        yield site
    finally:
        site.db.close()


def products_bytes(job: Job) -> int:
    """Return the memory of LoRA's products: of 1,024 tokens, with rank 16 in the four linear layers of DESCRIPTION."""
    assert job.spec["lora"]["rank"] == 16
    return 1024 * 4 * 16 * 2


def own_bytes(job: Job) -> int:
    """Return the memory of a job: its vectors with a bf16 copy and two further slices, and LoRA's products."""
    return 26 * job.adapter_parameters + products_bytes(job)


def step(number: int) -> dict[str, Any]:
    """Return the body of a `stepped` event."""
    numbers = {"loss": 1.0, "token_accuracy": 0.5, "learning_rate": 1e-3, "grad_norm": 1.0}
    return {"step": number, "num_tokens": 10, **numbers}


def emit(session: TrainerSession, *events: dict[str, Any]) -> None:
    writer = EventWriter(session.directory)
    writer.write(*events)
    writer.close()


def emit_for(session: TrainerSession, claim: Claim, kind: str, **body: Any) -> None:
    emit(session, {"type": kind, "claim_id": claim.claim_id, **body})


def received_verbs(session: TrainerSession) -> list[str]:
    """Return the verbs of the messages that the trainer was sent since the last call."""
    return [message.verb for message in InboxReader(session.directory).take()]


def directives_for(claim: Claim, **orders: bool) -> dict[str, ClaimDirectives]:
    return {claim.claim_id: ClaimDirectives(**orders)}


def events_in(directory: TrainerDirectory) -> list[dict[str, Any]]:
    return EventReader(directory).read()

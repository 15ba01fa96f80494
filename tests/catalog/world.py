"""The starting state of catalog tests, with helpers that reach other states."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from typing import cast as cast_to

from sqlalchemy import String, Table, cast, insert, literal, select, true

from catalog.db.database import Database, read_clock
from catalog.error_texts import ErrorText
from catalog.errors import Unauthorized
from catalog.fleet import workers
from catalog.history import queries
from catalog.jobs import commands, submission
from catalog.lifecycle import preparation
from catalog.lifecycle.preparation import FilesToPrepare
from catalog.pepper import Pepper
from catalog.plans import claims as plan_claims
from catalog.queue import claiming, claims
from catalog.queue.claiming import Claim
from catalog.registry import base_models
from catalog.scheduling.snapshot import Capacity
from catalog.spec.job import JobRequest
from catalog.states import PriorityClass
from catalog.storage import token_cache
from catalog.storage.manifest import Manifest, ManifestFile
from catalog.storage.store import Blob
from catalog.tables.history import JobEvent
from catalog.tables.jobs import Job
from catalog.tables.storage import File, Prepared
from catalog.tables.table import new_id
from catalog.tables.tasks import Task
from catalog.tables.tenancy import ApiKey, Project
from catalog.tasks import outcomes, task_queue
from catalog.tasks.task_queue import TaskClaim, TaskKind
from catalog.tenancy import authentication, organizations, projects
from catalog.tenancy.authentication import Caller
from tests.catalog.prepared_data import DETAILS, REPORT

PEPPER = Pepper(current=b"p" * 32)
LEASE = 60.0
WIDE = Capacity(max_jobs=16, memory_bytes_free=10**12)


def linears(**shapes: tuple[list[int], int]) -> dict[str, Any]:
    """Describe linear layers, given the shape and the number of each, as part of the description of a base model."""
    groups = [
        {"path": f"model.layers.*.{name}", "shape": shape, "layers": list(range(number))}
        for name, (shape, number) in shapes.items()
    ]
    return {"linear_shapes": {name: list(shape) for name, shape in shapes.items()}, "linear_paths": groups}


DESCRIPTION = {
    "num_parameters": 10_000,
    "vocab_size": 100,
    "max_positions": 512,
    **linears(q_proj=([64, 64], 2), v_proj=([16, 64], 2)),
}


def end_key(db: Database, api_key_id: str) -> None:
    """Revoke the key without a permission check."""
    with db.write() as session:
        session.get_one(ApiKey, api_key_id).revoked_at = read_clock(session)


def claim_import_of(db: Database, name: str) -> TaskClaim:
    """Claim the import of this base model, even if others wait longer."""
    with db.read() as session:
        others = session.scalars(select(Task.subject).where(Task.subject != name)).all()
    return claim_task(db, TaskKind.IMPORT, skipping=others)


@dataclass(frozen=True, kw_only=True)
class Preparing:
    """A claimed job or plan whose files are prepared. job: None for a plan."""

    task: TaskClaim
    files: FilesToPrepare
    job: Job | None = None


def begin_preparation(db: Database, worker_id: str = "w1") -> Preparing | None:
    """Claim the next job whose files wait for preparation."""
    task = try_claim(db, TaskKind.PREPARATION, worker_id)
    begun = task and preparation.begin(db, task, worker_id=worker_id)
    return Preparing(task=task, job=begun[0], files=begun[1]) if task and begun else None


def begin_plan(db: Database, worker_id: str = "w1") -> Preparing | None:
    task = try_claim(db, TaskKind.PLAN, worker_id)
    files = task and plan_claims.begin(db, task)
    return Preparing(task=task, files=files) if task and files else None


def try_claim(db: Database, kind: TaskKind, worker_id: str = "w1") -> TaskClaim | None:
    return task_queue.claim(db, [kind], worker_id=worker_id, lease_seconds=LEASE)


def claim_task(db: Database, kind: TaskKind, *, worker_id: str = "w1", skipping: Collection[str] = ()) -> TaskClaim:
    """Claim the next task of this kind, which must exist."""
    task = task_queue.claim(db, [kind], worker_id=worker_id, lease_seconds=LEASE, skipping=skipping)
    assert task is not None
    return task


def attempts(db: Database, subject: str) -> int:
    """Return the counted attempts of an unfinished task."""
    with db.read() as session:
        return session.scalars(select(Task.num_attempts).where(Task.subject == subject)).one()


class Clock:
    """Seconds since 1970. Each read advances the clock by a millisecond, and tests set `now`."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class World:
    def __init__(self, db: Database, clock: Clock) -> None:
        self.db, self.clock = db, clock
        self.caller = self.new_caller("ours")
        self.stranger = self.new_caller("theirs")
        self.base()
        self.file_id = self.file()

    def new_caller(self, project: str) -> Caller:
        return self._key_of(projects.ensure(self.db, project).id)

    def caller_of(self, organization: str, project: str) -> Caller:
        """Create an organization with a project and a key. Returns the caller of that key."""
        organizations.create(self.db, organization)
        return self._key_of(projects.create(self.db, project, organization=organization).id)

    def base(self, name: str = "smol", **description: Any) -> str:
        """Add a base model that is ready."""
        base_models.add(self.db, name=name, kind="folder", source=f"/models/{name}", revision=None)
        self.finish_import(name, digest=sha(name), description={**DESCRIPTION, **description})
        return name

    def finish_import(self, name: str, *, digest: str, description: dict[str, Any]) -> None:
        task = claim_import_of(self.db, name)
        base_models.finish_import(self.db, task, digest=digest, manifest={"files": []}, description=description)

    def fail_import(self, name: str, error: dict[str, Any]) -> None:
        """error: code, message and remedy."""
        outcomes.fail(self.db, claim_import_of(self.db, name), base_models.IMPORT, ErrorText(**error))

    def file(
        self,
        *,
        caller: Caller | None = None,
        purpose: str = "fine-tune",
        num_rows: int | None = 100,
        kind: str | None = None,
    ) -> str:
        file_id = new_id("file")
        with self.db.write() as session:
            session.add(
                File(
                    id=file_id,
                    project_id=(caller or self.caller).project_id,
                    purpose=purpose,
                    filename="train.jsonl",
                    num_bytes=10,
                    num_rows=num_rows,
                    kind=kind or ("chat" if purpose == "fine-tune" else None),
                    digest=sha(file_id),
                    created_at=read_clock(session),
                )
            )
        return file_id

    def submit(self, *, caller: Caller | None = None, **fields: Any) -> Job:
        return self.send(request(**{"training_file": self.file_id, **fields}), caller=caller)

    def send(self, body: JobRequest, *, caller: Caller | None = None, **given: Any) -> Job:
        given = {"body_digest": sha(body.model_dump_json()), **given}
        return submission.create(self.db, caller=caller or self.caller, request=body, **given)

    def worker(
        self,
        worker_id: str = "w1",
        memory_bytes: int = 10**12,
        *,
        kind: str = "cpu",
        quantizations: tuple[str, ...] = (),
        integrations: tuple[str, ...] = (),
        host: str = "here",
    ) -> str:
        devices = [{"kind": kind, "quantizations": list(quantizations)}]
        about = {"host": host, "pid": 1, "devices": devices, "version": "1", "integrations": integrations}
        workers.register_worker(self.db, worker_id=worker_id, memory_bytes=memory_bytes, **about)  # pyright: ignore
        return worker_id

    def load(self, key: str, worker_id: str = "w1") -> None:
        """Let the worker report that its trainer has loaded a base model, and answers requests."""
        trainer_id, digest = f"trainer-{worker_id}", key.rsplit(":", 2)[0]
        workers.register_trainer(self.db, trainer_id=trainer_id, worker_id=worker_id, base_digest=digest, pack_key=key)
        workers.worker_beat(self.db, worker_id, resident_base=digest, trainer_id=trainer_id, report={})
        address, secret = f"{worker_id}:1", f"secret of {worker_id}"
        workers.report_trainer(self.db, trainer_id, report={}, address=address, secret=secret)

    def prepare_all(self, num_steps: int = 60, longest_example: int | None = None) -> None:
        while unprepared := begin_preparation(self.db, "preparer"):
            key, digest = unprepared.files.train_key, unprepared.files.training.digest
            tokens, project_id = manifest(f"tokens {digest}", kind="tokens"), unprepared.files.project_id
            if token_cache.get(self.db, key) is None:
                self.put_tokens(key, file_digest=digest, artifact=tokens, report=REPORT, project_id=project_id)
            found = {"num_steps": num_steps, "longest_example": longest_example}
            preparation.finish(self.db, unprepared.task, **found)

    def put_tokens(self, key: str, *, project_id: str | None = None, **given: Any) -> Prepared:
        """Store a token cache of our project, or of the given one."""
        given = {"project_id": project_id or self.caller.project_id, "details": DETAILS, **given}
        return token_cache.put(self.db, key, **given)

    def queued(self, **fields: Any) -> Job:
        job = self.submit(**fields)
        self.prepare_all()
        return self.job(job.id)

    def flood(self, job: Job, number: int) -> None:
        """Add `number` copies of the job, each submitted and queued a millisecond after the previous one."""
        numbers = select(literal(1).label("n")).cte("numbers", recursive=True)
        numbers = numbers.union_all(select(numbers.c.n + 1).where(numbers.c.n < number))
        table = cast_to(Table, Job.__table__)
        copied: dict[str, Any] = {column.name: column for column in table.c}
        copied["id"] = table.c.id + "-" + cast(numbers.c.n, String)
        for name in ("created_at", "queued_at"):
            copied[name] = table.c[name] + numbers.c.n / 1000.0
        copies = select(*copied.values()).where(table.c.id == job.id).select_from(table.join(numbers, true()))
        with self.db.write() as session:
            session.execute(insert(table).from_select(list(copied), copies))

    def claim(
        self, worker_id: str = "w1", capacity: Capacity = WIDE, *, lease: float = LEASE, **given: Any
    ) -> list[Claim]:
        given = {"trainer_id": f"trainer-{worker_id}", **given}
        return claiming.claim_pack(self.db, worker_id=worker_id, capacity=capacity, lease_seconds=lease, **given)

    def running(self, **fields: Any) -> Claim:
        self.queued(**fields)
        (claim,) = self.claim()
        return claim

    def complete(self, claim_id: str, content: str = "adapter", *, course: claims.Course | None = None) -> Any:
        return claims.complete(
            self.db,
            claim_id,
            artifact=manifest(content),
            num_parameters=1,
            verification={"passed": True},
            evaluation=None,
            trained_tokens=5,
            course=course or claims.Course(steps=10, kept_step=10, stopped_early=None),
            curves=curves(f"curves of {claim_id}"),
            lineage={},
            lineage_id=sha(content),
        )

    def beat(self, *claim_ids: str, worker_id: str = "w1") -> dict[str, claims.ClaimDirectives]:
        return claims.heartbeat(self.db, worker_id=worker_id, claim_ids=claim_ids, lease_seconds=LEASE)

    def pass_time(self, seconds: float, *beating: str) -> None:
        """Let time pass while the database stays available and these claims are renewed."""
        while seconds > 0:
            step = min(10.0, seconds)
            self.clock.advance(step)
            self.beat(*beating, worker_id="observer")
            seconds -= step

    def of(self, job_id: str) -> dict[str, Any]:
        """Return the arguments that identify a job of our project."""
        return {"project_id": self.caller.project_id, "job_id": job_id}

    def job(self, job_id: str) -> Job:
        return commands.get(self.db, **self.of(job_id))

    def _key_of(self, project_id: str) -> Caller:
        key, secret = authentication.create(self.db, project_id=project_id, name="key", pepper=PEPPER)
        allow_urgent(self.db, key)
        return authentication.authenticate(self.db, secret=secret, pepper=PEPPER)

    def events(self, job_id: str) -> list[JobEvent]:
        """Return the events of our job, oldest first."""
        return queries.events_page(self.db, **self.of(job_id), limit=10_000).items[::-1]

    def transitions(self, job_id: str) -> list[tuple[str | None, str]]:
        events = self.events(job_id)
        return [(event.data["from"], event.data["to"]) for event in events if event.type == "transition" and event.data]


def allow_urgent(db: Database, key: ApiKey) -> None:
    """Allow the key and its project to submit jobs of every class, as operators do."""
    with db.write() as session:
        for row in (session.get_one(ApiKey, key.id), session.get_one(Project, key.project_id)):
            row.highest_priority = PriorityClass.urgent


def request(**fields: Any) -> JobRequest:
    return JobRequest.model_validate({"model": "smol", **fields})


def manifest(content: str, kind: str = "adapter") -> Manifest:
    return Manifest(kind=kind, files=(ManifestFile(path="a.bin", digest=sha(content), num_bytes=len(content)),))


def curves(content: str) -> Blob:
    """Return the blob of a job's result file."""
    return Blob(digest=sha(content), num_bytes=len(content))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def opens(world: World, secret: str) -> bool:
    """Return whether a key with this secret is accepted."""
    try:
        authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
    except Unauthorized:
        return False
    return True

"""Fills a catalog with the data that the pages show: jobs in every state, metrics and adapters."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from catalog.db.database import Database
from catalog.fleet import workers
from catalog.history import queries, result_files
from catalog.jobs import commands, submission
from catalog.lifecycle import preparation, recording
from catalog.pepper import Pepper
from catalog.pepper import load as load_pepper
from catalog.queue import claiming, claims
from catalog.registry import base_models, lineage
from catalog.registry.lineage import AttemptRecord, DataSource
from catalog.resources.pack_key import pack_key
from catalog.scheduling.snapshot import Capacity
from catalog.settings import Settings
from catalog.spec.job import JobRequest
from catalog.states import EndReason
from catalog.storage import files, token_cache
from catalog.storage.manifest import Manifest, files_digest
from catalog.storage.store import ArtifactStore, Blob, open_store
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import File
from catalog.tables.tenancy import Project
from catalog.tenancy import authentication, projects
from tests.catalog.prepared_data import DETAILS
from tests.catalog.world import allow_urgent, begin_preparation, claim_import_of, linears

LEASE_SECONDS = 3600.0
WORKER = "worker-bay-1"
TRAINER = "trainer-7f31c02e9a"
BASE = "smollm2-135m"
NUM_PARAMETERS = 2_949_120
MACHINE = {"device": "cpu", "dtype": "bfloat16", "invariance": "bitwise", "threads": 1}
NUM_STEPS = 240
STEPS_PER_EPOCH = NUM_STEPS / 3
DESCRIPTION = {
    "num_parameters": 134_515_008,
    "blocks": {"count": 30, "num_parameters": 106_203_840, "largest_parameters": 3_540_128},
    **linears(q_proj=([576, 576], 30), v_proj=([192, 576], 30), down_proj=([576, 1536], 30)),
    "vocab_size": 49152,
    "max_positions": 8192,
    "license": "apache-2.0",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeded:
    """A seeded service, with the objects that tests use."""

    db: Database
    store: ArtifactStore
    settings: Settings
    pepper: Pepper
    caller: authentication.Caller
    api_key: str
    training: File
    validation: File


def start(data_dir: Path) -> Seeded:
    """Create a service with one project, an operator key, a ready base model, two files and one worker."""
    settings = Settings(data_dir=data_dir)
    db = Database(settings.resolved_database_url())
    db.migrate()
    store = open_store(settings)
    pepper = load_pepper(settings, db)
    project = projects.ensure(db)
    key, api_key = authentication.create(
        db, project_id=project.id, name="first operator key", pepper=pepper, is_operator=True
    )
    allow_urgent(db, key)
    _import_base(db)
    register(db, {"kind": "cpu", "name": "2 cores", "memory_bytes": 16 * 2**30}, bytes_of_each=16 * 2**30)
    return Seeded(
        db=db,
        store=store,
        settings=settings,
        pepper=pepper,
        caller=authentication.authenticate(db, secret=api_key, pepper=pepper),
        api_key=api_key,
        training=upload(db, store, settings, project, "signatures-train.jsonl", NUM_STEPS * 4 // 3),
        validation=upload(db, store, settings, project, "signatures-held-out.jsonl", 96),
    )


def register(db: Database, device: dict[str, Any], *, bytes_of_each: int, worker_id: str = WORKER) -> None:
    """Register a worker on the host that its id names, or register it again."""
    host = worker_id.removeprefix("worker-")
    details = {"host": host, "pid": 4711, "devices": [device], "version": "0.1.0", "memory_bytes": bytes_of_each}
    workers.register_worker(db, worker_id=worker_id, **details)


def gpus(number: int, *, bytes_of_each: int, strategy: str = "auto") -> dict[str, Any]:
    """Return a device group of GPUs."""
    about = {"name": f"{number} x H100", "memory_bytes": number * bytes_of_each}
    return {"kind": "cuda", "num_processes": number, "strategy": strategy, **about}


def upload(db: Database, store: ArtifactStore, settings: Settings, project: Project, name: str, rows: int) -> File:
    spooled = settings.data_dir / "upload.jsonl"
    lines = [
        _chat(f"def f{number}(x)", f"Return the value {number} in {name.partition('-')[0]}.") for number in range(rows)
    ]
    spooled.write_text("\n".join(lines) + "\n")
    content = spooled.read_bytes()
    return files.create(
        db,
        store,
        project_id=project.id,
        purpose="fine-tune",
        filename=name,
        spooled=spooled,
        num_bytes=len(content),
        digest=hashlib.sha256(content).hexdigest(),
        settings=settings,
    )


def submit(seeded: Seeded, suffix: str | None, **fields: Any) -> Job:
    given: dict[str, Any] = {
        "model": BASE,
        "training_file": seeded.training.id,
        "validation_file": seeded.validation.id,
        "suffix": suffix,
        "hyperparameters": {"batch_size": 4, "n_epochs": 3},
    }
    request = JobRequest.model_validate({**given, **fields})
    digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    return submission.create(seeded.db, caller=seeded.caller, request=request, body_digest=digest)


def prepare(seeded: Seeded, *, num_steps: int = NUM_STEPS) -> None:
    """Record reports of tokenized files for every job that waits for its files."""
    while (work := begin_preparation(seeded.db, WORKER)) is not None:
        _put_report(seeded.db, work.files.train_key, work.files.training)
        if work.files.validation is not None and work.files.valid_key is not None:
            _put_report(seeded.db, work.files.valid_key, work.files.validation)
        preparation.finish(seeded.db, work.task, num_steps=num_steps)


def beat(seeded: Seeded, *, trainer_id: str = TRAINER) -> None:
    """Send a heartbeat of the worker, with the base model loaded."""
    base = base_models.get(seeded.db, BASE)
    report = {"tokens_per_second": 487.0}
    workers.worker_beat(seeded.db, WORKER, resident_base=base.digest, trainer_id=trainer_id, report=report)


def claim(seeded: Seeded, *, trainer_id: str = TRAINER, max_jobs: int = 16) -> dict[str, str]:
    """Start the waiting jobs in one trainer. Returns their claim ids by job id."""
    beat(seeded, trainer_id=trainer_id)
    base = base_models.get(seeded.db, BASE)
    assert base.digest is not None
    key = pack_key(base.digest, "bfloat16")
    capacity = Capacity(max_jobs=max_jobs, memory_bytes_free=12 * 2**30, resident_key=key)
    taken = claiming.claim_pack(
        seeded.db, worker_id=WORKER, trainer_id=trainer_id, capacity=capacity, lease_seconds=LEASE_SECONDS
    )
    for one in taken:
        claims.started(seeded.db, one.claim_id, trainer_id=trainer_id, resumed_from_step=None)
    return {one.job.id: one.claim_id for one in taken}


def train(
    seeded: Seeded, claim_id: str, *, until: int, since: int = 0, seed: int = 1, num_steps: int = NUM_STEPS
) -> None:
    """Record the metrics of steps since+1 … until, and the progress of the job."""
    for start_step in range(since, until, 20):
        points = list(_points(range(start_step + 1, min(start_step + 20, until) + 1), seed))
        recording.record_metrics(seeded.db, claim_id, points)
    last = _loss(until, seed)
    progress = {
        "step": until,
        "num_steps": num_steps,
        "epoch": round(until / STEPS_PER_EPOCH, 3),
        "loss": last,
        "tokens_per_second": 150.0 + 7 * seed,
        "seconds_left": (num_steps - until) * 1.4,
    }
    recording.record_progress(seeded.db, claim_id, progress)


def succeed(seeded: Seeded, claim_id: str, *, seed: int = 1, kept_step: int = NUM_STEPS, **machine: Any) -> str:
    """Store an adapter and complete the job. Returns the adapter's id. `machine` overrides fields of MACHINE."""
    folder = seeded.settings.data_dir / f"adapter-{seed}"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 32}))
    (folder / "adapter_model.safetensors").write_bytes(random.Random(seed).randbytes(300_000))
    (folder / "README.md").write_text("# An adapter\n")
    artifact = seeded.store.put_folder(folder, kind="adapter")
    loss = _mean_loss(NUM_STEPS, seed) + 0.12
    evaluation = {
        "base_loss": 2.913,
        "loss": loss,
        "base_perplexity": math.exp(2.913),
        "perplexity": math.exp(loss),
    }
    record = _record(seeded, claim_id, artifact, evaluation, machine=MACHINE | machine)
    adapter = claims.complete(
        seeded.db,
        claim_id,
        artifact=artifact,
        num_parameters=NUM_PARAMETERS,
        verification={"passed": True, "max_abs_diff": 3.1e-5 * seed, "tolerance": 0.01},
        evaluation=evaluation,
        trained_tokens=81_240,
        course=claims.Course(steps=NUM_STEPS, kept_step=kept_step, stopped_early=None),
        curves=_curves(seeded, claim_id, folder.with_suffix(".csv")),
        lineage=record,
        lineage_id=lineage.lineage_id(record),
    )
    return adapter.id


def fill(data_dir: Path) -> Seeded:
    """Create jobs in every state: 2 succeeded, 1 failed, 1 cancelled, 1 paused, 3 running, 2 queued, 1 validating."""
    seeded = start(data_dir)
    done = [
        submit(seeded, "docstrings-r16"),
        submit(seeded, "docstrings-r64", lora={"rank": 64}),
        submit(seeded, "hot-lr", optimizer={"learning_rate": 0.01}),
    ]
    prepare(seeded)
    held = claim(seeded, trainer_id="trainer-19be44d0c1")
    for seed, job in enumerate(done[:2], start=1):
        train(seeded, held[job.id], until=NUM_STEPS, seed=seed)
        succeed(seeded, held[job.id], seed=seed)
    train(seeded, held[done[2].id], until=37, seed=3)
    claims.end(seeded.db, held[done[2].id], reason=EndReason.DIVERGED, detail="loss nan at step 38", error=DIVERGED)
    _stop_two(seeded)
    running = [
        submit(seeded, "titles-r8", lora={"rank": 8}, metadata={"team": "search", "study": "rank"}),
        submit(seeded, "titles-r16", lora={"rank": 16, "alpha": 16}, seed=7, optimizer={"learning_rate": 1e-4}),
        submit(seeded, "titles-r32", lora={"rank": 32}, metadata={"team": "search", "study": "rank"}),
    ]
    prepare(seeded)
    held = claim(seeded)
    for seed, (job, until) in enumerate(zip(running, (188, 121, 64), strict=True), start=4):
        train(seeded, held[job.id], until=until, seed=seed)
    submit(seeded, "nightly-a", priority="urgent")
    submit(seeded, "nightly-b")
    prepare(seeded)
    submit(seeded, "summaries-r16")
    return seeded


DIVERGED = {
    "code": "diverged",
    "message": "The loss became NaN at step 38. Lower the learning rate (it was 0.01) or set max_grad_norm.",
    "param": "optimizer.learning_rate",
}


def _stop_two(seeded: Seeded) -> None:
    cancelled, paused = submit(seeded, "wrong-file"), submit(seeded, "reviews-long")
    commands.cancel(seeded.db, project_id=seeded.caller.project_id, job_id=cancelled.id)
    prepare(seeded)
    held = claim(seeded, trainer_id="trainer-2c90ab77f3")
    train(seeded, held[paused.id], until=90, seed=9)
    commands.pause(seeded.db, project_id=seeded.caller.project_id, job_id=paused.id)
    claims.end(seeded.db, held[paused.id], reason=EndReason.PAUSED_BY_USER, detail="paused at step 90")


def _import_base(db: Database) -> None:
    base_models.add(db, name=BASE, kind="gguf", source="/models/smollm2-135m-instruct.gguf")
    manifest = {"files": [{"path": "model.safetensors", "digest": "5e" * 32, "num_bytes": 269_060_552}]}
    details = {"manifest": manifest, "description": DESCRIPTION}
    base_models.finish_import(db, claim_import_of(db, BASE), digest=files_digest(manifest), **details)


def _put_report(db: Database, key: str, file: File) -> None:
    of_file: dict[str, Any] = {"project_id": file.project_id, "file_digest": file.digest}
    token_cache.put(db, key, **of_file, artifact=None, report=_report(file), details=DETAILS)


def _report(file: File) -> dict[str, Any]:
    """Return a report in the format of worker.children.tokenizer.main."""
    rows = file.num_rows or 0
    return {
        "format": 1,
        "max_length": 4096,
        "rows": rows,
        "usable_rows": rows,
        "tokens": rows * 66,
        "supervised_tokens": rows * 19,
        "truncated_rows": 2,
        "empty_rows": 0,
        "duplicate_rows": 5,
        "longest_row": 412,
        "median_row": 61,
        "tokenizer": "ab" * 32,
        "chat_template": "cd" * 32,
        "answers_by": "generation blocks",
    }


def _points(steps: range, seed: int) -> Iterator[dict[str, Any]]:
    for step in steps:
        loss = _loss(step, seed)
        warm = min(1.0, step / 8)
        yield {
            "kind": "train",
            "step": step,
            "loss": loss,
            "token_accuracy": max(0.0, 0.83 - loss * 0.16),
            "learning_rate": 2e-4 * warm * (0.5 + 0.5 * math.cos(math.pi * step / NUM_STEPS)),
            "grad_norm": 0.4 + 1.6 * math.exp(-step / 30) + random.Random(seed * 7919 + step).random() * 0.3,
            "num_tokens": 280,
        }
        if step == 1 or step % 24 == 0:
            smooth = _mean_loss(step, seed) + 0.12
            yield {"kind": "valid", "step": step, "loss": smooth, "token_accuracy": 0.8 - smooth * 0.16}


def _mean_loss(step: int, seed: int) -> float:
    return 1.35 + 0.03 * (seed % 5) + 1.5 * math.exp(-step / (28 + 4 * seed))


def _loss(step: int, seed: int) -> float:
    return _mean_loss(step, seed) + random.Random(seed * 104729 + step).gauss(0, 0.11)


def _chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def _curves(seeded: Seeded, claim_id: str, path: Path) -> Blob:
    with seeded.db.read() as session:
        job_id = session.get_one(Attempt, claim_id).job_id
    return result_files.store_curves(seeded.db, seeded.store, job_id=job_id, path=path)


def _record(
    seeded: Seeded, claim_id: str, artifact: Manifest, evaluation: dict[str, float], *, machine: dict[str, Any]
) -> dict[str, Any]:
    """Return the lineage record of the claim's adapter."""
    project_id = seeded.caller.project_id
    job = next(
        job for job in commands.list_page(seeded.db, project_id=project_id, limit=50).items if job.claim_id == claim_id
    )
    attempts = queries.attempts(seeded.db, project_id=project_id, job_id=job.id)
    packmates_by_claim = queries.packmates(seeded.db, project_id=project_id, job_id=job.id)
    return lineage.build(
        job=job,
        base=base_models.get(seeded.db, BASE),
        adapter=artifact,
        num_parameters=NUM_PARAMETERS,
        data=[
            DataSource(role="training", file=seeded.training, tokens="1f" * 32, report=_report(seeded.training)),
            DataSource(role="validation", file=seeded.validation, tokens="2e" * 32, report=_report(seeded.validation)),
        ],
        attempts=[
            AttemptRecord(attempt=one, trainer=machine, packmates=packmates_by_claim.get(one.claim_id, []))
            for one in attempts
        ],
        results={
            "steps": NUM_STEPS,
            "trained_tokens": 81_240,
            "evaluation": evaluation,
            "loss_log": "3d" * 32,
            "determinism": "bitwise",
        },
        code={"lorry": "0.1.0", "torch": "2.9.1", "transformers": "5.1.0", "peft": "0.18.0"},
    )


def another_project(seeded: Seeded) -> Seeded:
    """Return the service as seen by another project, which has one file."""
    project = projects.ensure(seeded.db, "others")
    _, secret = authentication.create(seeded.db, project_id=project.id, name="theirs", pepper=seeded.pepper)
    caller = authentication.authenticate(seeded.db, secret=secret, pepper=seeded.pepper)
    training = upload(seeded.db, seeded.store, seeded.settings, project, "theirs.jsonl", 40)
    return replace(seeded, caller=caller, training=training, validation=training)

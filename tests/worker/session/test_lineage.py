"""The determinism in a lineage record: the weakest level of all trainers whose steps the adapter contains."""

from __future__ import annotations

import pytest

from catalog.fleet import workers
from catalog.history import queries
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.registry import adapters
from catalog.registry.lineage import AttemptRecord, lineage_id
from catalog.scheduling.snapshot import Capacity
from catalog.states import EndReason
from catalog.tables.history import Attempt
from tests.worker.pack_site import PASSED, PackSite, emit_for
from worker.session.publishing import earlier_guarantees


def attempt(site: PackSite, number: int, level: str, *, from_step: int = 0, saves: int | None = None) -> Claim:
    """Run one more attempt, on its own trainer. It resumes from a step, and stores a checkpoint or the adapter."""
    trainer_id = f"trainer-{number}"
    workers.register_trainer(site.db, trainer_id=trainer_id, worker_id="w1", base_digest="d", pack_key="k")
    (claim,) = site.claim_all(trainer_id, capacity=Capacity(max_jobs=1, memory_bytes_free=10**12))
    session = site.session(claim, trainer_id=trainer_id, invariance=level, from_step=from_step)
    if saves is not None:
        emit_for(session, claim, "checkpointed", step=saves, folder=site.checkpoint(session, claim, saves))
        session.read_events()
        claims.end(site.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
        return claim
    emit_for(
        session,
        claim,
        "exported",
        step=10,
        kept_step=10,
        stopped_early=None,
        folder=site.checkpoint(session, claim, 10),
        num_parameters=1,
        trained_tokens=1,
        report=PASSED,
    )
    session.read_events()
    return claim


def recorded_level(site: PackSite, claim: Claim) -> str:
    name = site.world.job(claim.job.id).adapter_name
    assert name is not None
    view = adapters.get(site.db, project_id=claim.job.project_id, name=name)
    return view.adapter.lineage["results"]["determinism"]


@pytest.mark.parametrize("level", ["bitwise", "allclose"])
def test_the_determinism_of_a_trainer_is_recorded_with_its_adapter(site: PackSite, level: str) -> None:
    site.queued()

    claim = attempt(site, 1, level)

    assert recorded_level(site, claim) == level


@pytest.mark.parametrize(
    ("first", "second", "from_step", "recorded"),
    [
        ("bitwise", "bitwise", 5, "bitwise"),
        ("allclose", "bitwise", 5, "allclose"),
        ("bitwise", "allclose", 5, "allclose"),
        ("allclose", "bitwise", 0, "bitwise"),
    ],
)
def test_steps_of_an_earlier_trainer_count_with_its_determinism_unless_discarded(
    site: PackSite, first: str, second: str, from_step: int, recorded: str
) -> None:
    site.queued()

    attempt(site, 1, first, saves=5)
    claim = attempt(site, 2, second, from_step=from_step)

    assert recorded_level(site, claim) == recorded


@pytest.mark.parametrize(
    ("attempts", "counted"),
    [
        ([(None, "a"), (50, "b"), (100, "c")], ["b", "a"]),
        ([(None, "a"), (50, "b"), (50, "c")], ["a"]),  # the second attempt stored nothing
        ([(None, "a"), (None, "b"), (50, "c")], ["b", "a"]),  # it is unknown which of them reached step 50
        ([(None, "a"), (None, None), (50, "c")], ["a"]),  # its trainer was never ready
        ([(None, "a"), (50, None), (100, "c")], ["allclose", "a"]),  # it trained on an unknown trainer
        ([(None, "a"), (50, "b"), (None, "c")], []),
        ([(None, "a"), (100, "b"), (50, "c"), (70, "d")], ["c", "a"]),  # a checkpoint was damaged
    ],
)
def test_only_attempts_whose_steps_the_last_attempt_contains_count(
    attempts: list[tuple[int | None, str | None]], counted: list[str]
) -> None:
    records = [
        AttemptRecord(attempt=Attempt(resumed_from_step=step), trainer={} if level is None else {"invariance": level})
        for step, level in attempts
    ]

    assert earlier_guarantees(records) == counted


def test_a_checkpoint_is_a_model_with_its_own_lineage_record(site: PackSite) -> None:
    claim = site.claim()
    workers.register_trainer(site.db, trainer_id="trainer-1", worker_id="w1", base_digest="d", pack_key="k")
    session = site.session(claim)
    saved = site.exported(session, claim, 5)

    emit_for(session, claim, "checkpointed", **saved)
    session.read_events()

    (row,) = site.checkpoints(claim)
    view = adapters.get(site.db, project_id=claim.job.project_id, name=row.name or "")
    manifest = site.store.get_manifest(view.adapter.artifact)
    record = view.adapter.lineage
    assert [file.path for file in manifest.files] == ["README.md", "adapter_model.safetensors"]
    assert (view.adapter.num_parameters, record["results"]["is_checkpoint"], record["results"]["steps"]) == (
        24,
        True,
        5,
    )
    assert record["people"]["finished_at"] is None
    assert [(one["end"], one["ended_at"]) for one in record["attempts"]] == [(None, None)]
    assert record["outputs"]["artifact"] == manifest.digest
    assert lineage_id(record) == view.adapter.lineage_id
    assert not (session.directory.path / saved["folder"]).exists()
    assert not (session.directory.path / saved["adapter"]).exists()


def test_a_paused_job_records_its_checkpoint_first_and_then_its_model(site: PackSite) -> None:
    claim = site.claim()
    workers.register_trainer(site.db, trainer_id="trainer-1", worker_id="w1", base_digest="d", pack_key="k")
    session = site.session(claim)
    saved = site.exported(session, claim, 5)
    emit_for(session, claim, "checkpointed", **saved | {"adapter": None})
    session.read_events()
    (on_record,) = site.checkpoints(claim)

    emit_for(session, claim, "paused", **{name: saved[name] for name in ("step", "adapter", "num_parameters")})
    session.read_events()

    (row,) = site.checkpoints(claim)
    assert (on_record.artifact, on_record.adapter) == (row.artifact, None)
    view = adapters.get(site.db, project_id=claim.job.project_id, name=row.name or "")
    assert (view.adapter.num_parameters, view.adapter.lineage["results"]["steps"]) == (24, 5)
    assert site.reason(claim) == "drained"
    events = site.world.events(claim.job.id)
    assert [event.message for event in events].count("Checkpoint created at step 5") == 1


def test_a_checkpoint_that_is_no_model_is_recorded_in_the_jobs_events(site: PackSite) -> None:
    claim = site.claim()
    session = site.session(claim)

    error = {"code": "disk_error", "message": "The disk failed.", "remedy": "Check the disk."}
    emit_for(session, claim, "checkpoint_unexported", step=5, error=error)
    session.read_events()

    events = queries.events_page(site.db, **site.world.of(claim.job.id)).items
    assert events[0].message == "The checkpoint of step 5 can't be used as a model. The disk failed."

"""Files that are staged for a job's trainer, including those of a parent adapter, and the evaluation interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from catalog.history import queries
from catalog.jobs import commands
from catalog.lifecycle.outcomes import BACK_OFF_SECONDS
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.scheduling.snapshot import Capacity
from catalog.spec.job import JobSpec
from catalog.states import MAX_LOSSES, EndReason, JobState
from catalog.storage import token_cache
from catalog.storage.store import blob_key
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, BaseModelRow, File
from tests.worker.pack_site import PackSite
from worker.background import base_models, tokenization
from worker.children.trainer.job_config import job_config
from worker.protocol.mailbox import AdmitBody, InboxReader
from worker.session import publishing
from worker.session.trainer_session import TrainerSession


@pytest.fixture
def parent(site: PackSite) -> Adapter:
    """Return an adapter whose files are in the store."""
    manifest = site.store.put_folder(site.files("made", "adapter_model.safetensors", "the numbers"), kind="adapter")
    claim = site.claim()
    return claims.complete(
        site.db,
        claim.claim_id,
        artifact=manifest,
        num_parameters=1,
        verification={"passed": True},
        evaluation=None,
        trained_tokens=1,
        course=claims.Course(steps=1, kept_step=1, stopped_early=None),
        curves=site.store.put_bytes(b""),
        lineage={},
        lineage_id="the parent's record",
    )


def brought(session: TrainerSession) -> str:
    (message,) = InboxReader(session.directory).take()
    return message.body["parent"]


def test_the_parents_files_are_staged_for_each_attempt(site: PackSite, parent: Adapter) -> None:
    first = site.claim(parent_adapter=parent.id, seed=2)
    for attempt, claim in ((1, first), (2, None)):
        held = claim or _again(site, first)
        session = site.loading_session(held, trainer_id=f"trainer-{attempt}")

        folder = session.directory.path / brought(session)

        assert (folder / "adapter_model.safetensors").read_text() == "the numbers"


def _again(site: PackSite, claim: Claim) -> Claim:
    claims.end(site.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
    (again,) = site.claim_all(capacity=Capacity(max_jobs=1, memory_bytes_free=10**12))
    return again


def test_a_damaged_checkpoint_is_skipped_and_can_be_stored_again(site: PackSite) -> None:
    claim = site.claim_with_checkpoints(10, 20)
    newest, older = claim.resume_candidates
    assert newest.artifact is not None
    (file, *_) = site.store.get_manifest(newest.artifact).files
    site.store.objects.put(blob_key(file.digest), b"Step 20")

    session = site.loading_session(claim)

    (message,) = InboxReader(session.directory).take()
    assert message.body["resume"].endswith(f"step-{older.step}")
    assert site.store.put_bytes(b"step 20").digest == file.digest
    assert site.store.verify(site.store.get_manifest(newest.artifact)) == []


def test_no_parent_is_staged_for_a_job_without_one(site: PackSite) -> None:
    assert brought(site.loading_session(site.claim())) is None


def test_a_job_with_a_damaged_parent_is_not_started(site: PackSite, parent: Adapter) -> None:
    (file,) = site.store.get_manifest(parent.artifact).files
    site.store.objects.put(blob_key(file.digest), b"other bytes")
    claim = site.claim(parent_adapter=parent.id, seed=2)

    session = site.loading_session(claim)

    assert InboxReader(session.directory).take() == []
    assert site.reason(claim) == EndReason.INFRA_LOST
    (attempt,) = queries.attempts(site.db, **site.world.of(claim.job.id))
    assert parent.name in (attempt.detail or "")


def test_a_job_quarantined_for_its_damaged_parent_has_a_matching_remedy(site: PackSite, parent: Adapter) -> None:
    (file,) = site.store.get_manifest(parent.artifact).files
    site.store.objects.put(blob_key(file.digest), b"other bytes")
    job = site.queued(parent_adapter=parent.id, seed=2)

    for number in range(MAX_LOSSES):
        (claim,) = site.claim_all(f"trainer-{number}")
        site.loading_session(claim, trainer_id=f"trainer-{number}")
        site.world.clock.advance(BACK_OFF_SECONDS[-1] + 1)

    error = site.world.job(job.id).error or {}
    assert (error["code"], site.world.job(job.id).state) == ("quarantined", JobState.FAILED)
    assert "Restore the store from a backup" in error["message"]
    assert "why workers are lost" not in error["message"]


def test_a_file_that_is_rejected_when_tokenized_again_fails_its_job(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = {"code": "nothing_to_learn", "message": "All masked.", "remedy": "Give another."}
    claim = site.claim()
    row = token_cache.get(site.db, claim.job.train_prepared)
    assert row is not None
    (tokens,) = site.store.get_manifest(row.artifact or "").files
    site.store.objects.put(blob_key(tokens.digest), b"other bytes")
    source = site.store.put_bytes(b"the data file")
    with site.db.write() as session:
        session.get_one(File, claim.job.training_file).digest = source.digest
    monkeypatch.setattr(base_models, "ensure", lambda *_, **__: Path("/nowhere"))

    def refuse(_context: object, work: Path, *_: object, **__: object) -> dict[str, Any]:
        (work / "details.json").write_text("{}")
        return {"usable_rows": 0, "refusal": refusal}

    monkeypatch.setattr(tokenization, "_run", refuse)
    site.context.scratch_dir().mkdir(parents=True, exist_ok=True)

    site.loading_session(claim)

    job = site.world.job(claim.job.id)
    assert (job.state, job.reason) == (JobState.FAILED, EndReason.USER_ERROR)
    assert ((job.error or {})["code"], (job.error or {})["param"]) == ("nothing_to_learn", "training_file")


@pytest.mark.parametrize(("requested", "expected"), [("auto", 6), (2, 2), (60, 60), (61, 60)])
def test_a_trainer_evaluates_within_the_sixty_steps_of_the_job(
    site: PackSite, requested: int | str, expected: int
) -> None:
    claim = site.claim(validation_file=site.world.file(), evaluation={"every_steps": requested, "keep": "best"})

    (message,) = InboxReader(site.loading_session(claim).directory).take()
    config = job_config(
        JobSpec.model_validate(message.body["spec"]),
        num_steps=message.body["num_steps"],
        evaluate_every_steps=message.body["evaluate_every_steps"],
    )

    assert (config.num_steps, config.evaluate_every_steps, config.keep) == (60, expected, "best")


def test_the_lineage_record_of_a_child_names_that_of_its_parent(
    site: PackSite, parent: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim(parent_adapter=parent.id, seed=2)
    monkeypatch.setattr(publishing, "_data", lambda *_: [])
    manifest = site.store.get_manifest(parent.artifact)

    built = publishing.draft_lineage(
        site.context, claim, manifest, num_parameters=1, trainer={"invariance": "bitwise", "versions": {}}, results={}
    )

    assert built["graph"] == {"parents": ["the parent's record"]}
    assert built["config"]["resolved"]["parent"]["artifact"] == parent.artifact


def test_a_trainer_receives_every_field_of_an_admit_message(site: PackSite) -> None:
    session = site.loading_session(site.claim())

    (message,) = InboxReader(session.directory).take()

    assert set(message.body) == set(AdmitBody.__annotations__)


def test_a_trainer_receives_the_number_of_out_of_memory_ends_of_a_job(site: PackSite) -> None:
    claim, counts = site.claim(), list[int]()
    for attempt in range(3):
        session = site.loading_session(claim, trainer_id=f"trainer-{attempt}")
        (message,) = InboxReader(session.directory).take()
        counts.append(message.body["shortages"])
        claims.end(site.db, claim.claim_id, reason=EndReason.HOST_OOM, detail="")
        with site.db.write() as db_session:
            db_session.get_one(Job, claim.job.id).run_after = None
        if attempt < 2:
            (claim,) = site.claim_all(capacity=Capacity(max_jobs=1, memory_bytes_free=10**12))

    assert counts == [0, 1, 2]
    assert commands.get(site.db, project_id=claim.job.project_id, job_id=claim.job.id).state == JobState.FAILED


@pytest.mark.parametrize(
    ("kind", "source", "manifest", "reference"),
    [
        ("hub", "org/smol", {"files": [], "revision": "12fd25f"}, ("org/smol", "12fd25f")),
        ("hub", "org/smol", {"files": []}, ("org/smol", "main")),
        ("folder", "/models/smol", {"files": []}, ("smol", None)),
    ],
)
def test_the_trainer_writes_the_hub_id_of_the_base_model_but_no_path(
    site: PackSite, kind: str, source: str, manifest: dict[str, Any], reference: tuple[str, str | None]
) -> None:
    with site.db.write() as session:
        row = session.get_one(BaseModelRow, "smol")
        row.kind, row.source, row.revision, row.manifest = kind, source, "main", manifest

    (message,) = InboxReader(site.loading_session(site.claim()).directory).take()

    assert (message.body["base_name"], message.body["base_revision"]) == reference

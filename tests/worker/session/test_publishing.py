"""Publication of the files that a trainer wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace, StaleClaim
from catalog.lifecycle import recording
from catalog.registry import adapters
from catalog.registry import lineage as registry
from catalog.storage import files
from catalog.storage.manifest import DamagedArtifact, Manifest
from tests.worker.pack_site import OUTAGE, READY, PackSite, emit_for
from worker.session import publishing


def test_a_missing_folder_is_not_stored_as_an_empty_artifact(site: PackSite) -> None:
    with pytest.raises(DamagedArtifact, match="does not exist"):
        site.store.put_folder(site.folder / "none", kind="checkpoint")


@pytest.mark.parametrize(("name", "reason"), [("none", "which does not exist"), ("pipe", "not a regular file")])
def test_an_unusable_folder_of_a_trainer_is_reported_with_its_worker(site: PackSite, name: str, reason: str) -> None:
    claim = site.claim()
    directory = site.session(claim).directory
    folder = directory.job_path(claim.claim_id) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name == "pipe":
        folder.mkdir()
        os.mkfifo(folder / "adapter_model.safetensors")
    exported = {"folder": directory.named(folder), "step": 1, "kept_step": 1, "stopped_early": None}

    with pytest.raises(DamagedArtifact, match=reason) as caught:
        publishing.adapter(site.context, claim, directory, exported, trainer={})

    assert f"orker {site.context.worker_id} " in caught.value.message
    assert "reinstall Lorry's dependencies on that worker" in caught.value.remedy


def test_a_very_large_loss_has_a_finite_perplexity(site: PackSite) -> None:
    claim = site.claim()
    recording.record_metrics(site.db, claim.claim_id, [{"kind": "valid", "step": 0, "loss": 1000.0}])

    evaluation = publishing.evaluate(site.context, claim, kept_step=5)

    assert evaluation is not None
    assert evaluation["base_loss"] == 1000.0
    assert math.isfinite(evaluation["perplexity"])


def test_the_recorded_loss_is_that_of_the_kept_weights(site: PackSite) -> None:
    claim = site.claim()
    curve = [(0, 3.0), (5, 2.0), (10, 2.5)]
    points = [{"kind": "valid", "step": step, "loss": loss} for step, loss in curve]
    recording.record_metrics(site.db, claim.claim_id, points)

    for kept_step, loss in ((5, 2.0), (10, 2.5)):
        evaluation = publishing.evaluate(site.context, claim, kept_step=kept_step)

        assert evaluation is not None
        assert (evaluation["base_loss"], evaluation["loss"], evaluation["step"]) == (3.0, loss, kept_step)


def test_a_child_is_compared_with_its_parent_by_the_loss_of_step_0(site: PackSite) -> None:
    parent = site.world.complete(site.claim().claim_id)
    claim = site.claim(parent_adapter=parent.id, seed=2)
    points = [
        {"kind": "valid", "step": step, "loss": loss, "token_accuracy": 0.5} for step, loss in ((0, 2.0), (9, 1.0))
    ]
    recording.record_metrics(site.db, claim.claim_id, points)

    evaluation = publishing.evaluate(site.context, claim, kept_step=9)

    assert evaluation is not None
    assert (evaluation["parent_loss"], evaluation["loss"], evaluation["parent_token_accuracy"]) == (2.0, 1.0, 0.5)
    assert evaluation["parent_perplexity"] == math.exp(2.0)
    assert not [name for name in evaluation if name.startswith("base_")]


def test_curves_and_a_model_card_are_stored_with_the_adapter(site: PackSite) -> None:
    claim = site.claim()
    recording.record_metrics(
        site.db, claim.claim_id, [{"kind": "train", "step": 1, "loss": 2.5, "token_accuracy": 0.5}]
    )
    course = {"step": 1, "kept_step": 1, "stopped_early": None}
    site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
    session = site.session(claim)
    folder = session.directory.job_path(claim.claim_id) / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text("the numbers")
    exported = {**course, "num_parameters": 1, "report": {"passed": True}, "trained_tokens": 9}
    exported["folder"] = session.directory.named(folder)

    publishing.adapter(site.context, claim, session.directory, exported, trainer=READY)

    job = site.world.job(claim.job.id)
    assert job.result_file is not None
    result = files.get(site.db, project_id=job.project_id, file_id=job.result_file)
    assert b"".join(site.store.open_blob(result.digest)).splitlines()[1:] == [b"1,2.5,0.5,,"]
    adapter = adapters.get(site.db, project_id=job.project_id, name=job.adapter_name or "")
    manifest = Manifest.from_rows(adapter.artifact.kind, adapter.artifact.files)
    assert [file.path for file in manifest.files] == ["README.md", "adapter_model.safetensors"]
    assert b"# LoRA adapter for smol" in b"".join(site.store.open_blob(manifest.files[0].digest))
    assert site.store.get_manifest(manifest.digest) == manifest
    row = adapter.adapter
    assert row.lineage["outputs"]["artifact"] == manifest.digest
    assert registry.lineage_id(row.lineage) == row.lineage_id


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OutOfSpace(ErrorText(code="out_of_space", message="The disk is full.", remedy="Free some space.")),
            "The disk is full. Free some space.",
        ),
        (FileNotFoundError("/srv/lorry/store"), "FileNotFoundError; see the worker's log."),
    ],
)
def test_a_checkpoint_that_cannot_be_published_is_kept_with_a_warning(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    claim = site.claim()
    session = site.session(claim)
    monkeypatch.setattr(publishing, "draft_lineage", raises(error))

    emit_for(session, claim, "checkpointed", **site.exported(session, claim, 5))
    session.read_events()

    (kept,) = site.checkpoints(claim)
    assert (kept.step, kept.adapter) == (5, None)
    assert kept.artifact is not None
    assert site.world.job(claim.job.id).state == "running"
    events = site.world.events(claim.job.id)
    (warning,) = [event.message for event in events if event.level == "warn"]
    assert warning == f"The checkpoint of step 5 can't be used as a model. {reason}"


@pytest.mark.parametrize("error", [StaleClaim(), OUTAGE])
def test_a_stale_claim_and_an_outage_are_raised(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    claim = site.claim()
    session = site.session(claim)
    monkeypatch.setattr(publishing, "draft_lineage", raises(error))

    with pytest.raises(type(error)):
        publishing.checkpoint(site.context, claim, session.directory, site.exported(session, claim, 5), trainer={})

    assert site.checkpoints(claim) == []


def raises(error: Exception) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail

"""The history of a job over HTTP: events, metrics, checkpoints, attempts and data reports."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from catalog.lifecycle import preparation, recording
from catalog.queue import claims
from tests.api.site import error_of
from tests.catalog.prepared_data import REPORT
from tests.catalog.world import World, begin_preparation, manifest

JOBS = "/v1/fine_tuning/jobs"


def test_events_are_paginated_newest_first(client: TestClient, world: World) -> None:
    job = world.queued()
    path = f"{JOBS}/{job.id}/events"

    everything = client.get(path, params={"limit": 100}).json()["data"]
    first = client.get(path, params={"limit": 1}).json()
    rest = client.get(path, params={"after": first["data"][-1]["id"], "limit": 100}).json()

    assert everything == first["data"] + rest["data"]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert everything[-1]["message"] == f"Created fine-tuning job: {job.id}"
    assert {event["object"] for event in everything} == {"fine_tuning.job.event"}
    assert {event["type"] for event in everything} <= {"message", "metrics"}


@pytest.mark.parametrize("after", ["x", "ftevent-", "ftevent-99999999", "ftevent-" + "9" * 40, "-1"])
def test_unknown_event_cursor_is_rejected(client: TestClient, world: World, after: str) -> None:
    response = client.get(f"{JOBS}/{world.submit().id}/events", params={"after": after})

    assert response.status_code == 400
    assert error_of(response)["param"] == "after"


def test_events_filtered_by_type_are_paginated(client: TestClient, world: World) -> None:
    world.worker()
    claim = world.running()
    for step in range(1, 4):
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": step, "loss": 1.0 / step}])
        recording.record_event(world.db, claim.claim_id, "info", f"word {step}")
    path = f"{JOBS}/{claim.job.id}/events"

    def pages(**query: str) -> list[str]:
        ids: list[str] = []
        while True:
            page = client.get(path, params={**query, "limit": "2", **({"after": ids[-1]} if ids else {})}).json()
            ids += [event["id"] for event in page["data"]]
            if not page["has_more"]:
                return ids

    everything = client.get(path, params={"limit": 100}).json()["data"]
    for kind in ("message", "metrics"):
        assert pages(type=kind) == [event["id"] for event in everything if event["type"] == kind]
    assert len(pages(type="metrics")) == 3
    after_a_metric = client.get(path, params={"type": "message", "after": everything[1]["id"]}).json()["data"]
    assert after_a_metric[0]["message"] == "word 2"


def test_unknown_event_type_is_rejected(client: TestClient, world: World) -> None:
    response = client.get(f"{JOBS}/{world.submit().id}/events", params={"type": "transition"})

    assert response.status_code == 400
    assert error_of(response)["param"] == "type"
    assert "'message' or 'metrics'" in error_of(response)["message"]


def test_metrics_checkpoints_and_attempts_are_listed(client: TestClient, world: World) -> None:
    world.worker()
    first, second = world.queued(suffix="a"), world.queued(suffix="b")
    taken = {claim.job.id: claim for claim in world.claim()}
    claim = taken[first.id]
    claims.started(world.db, claim.claim_id, trainer_id="trainer-w1", resumed_from_step=0)
    points = [{"kind": "train", "step": step, "loss": 3.0 / step, "num_tokens": 10} for step in range(1, 6)]
    recording.record_metrics(world.db, claim.claim_id, [*points, {"kind": "valid", "step": 5, "loss": 0.5}])
    exported = recording.Exported(artifact=manifest("weights"), lineage={}, lineage_id="1" * 64)
    files = manifest("c", kind="checkpoint")
    recording.record_checkpoint(world.db, claim.claim_id, step=5, artifact=files, exported=exported)

    train = client.get(f"{JOBS}/{first.id}/metrics").json()["data"]
    valid = client.get(f"{JOBS}/{first.id}/metrics", params={"kind": "valid"}).json()["data"]
    (checkpoint,) = client.get(f"{JOBS}/{first.id}/checkpoints").json()["data"]
    (attempt,) = client.get(f"{JOBS}/{first.id}/attempts").json()["data"]

    assert [(point["step"], point["loss"]) for point in train] == [(step, 3.0 / step) for step in range(1, 6)]
    assert valid[0]["loss"] == 0.5
    assert checkpoint["fine_tuned_model_checkpoint"] == f"ft:smol:ours:a:{first.id[-8:]}:ckpt-step-5"
    assert (checkpoint["step_number"], checkpoint["metrics"]["train_loss"]) == (5, 0.6)
    assert checkpoint["metrics"]["full_valid_loss"] == 0.5
    assert checkpoint["available"] is True
    assert attempt["packmates"] == [second.id]
    assert (attempt["number"], attempt["trainer_id"]) == (1, "trainer-w1")


def test_checkpoint_has_only_the_metrics_of_its_own_step(client: TestClient, world: World) -> None:
    world.worker()
    claim = world.running()
    points = [{"kind": "train", "step": step, "loss": 3.0 / step, "token_accuracy": 0.5} for step in (2, 3)]
    recording.record_metrics(world.db, claim.claim_id, [*points, {"kind": "valid", "step": 2, "loss": 0.7}])
    for step in (2, 3, 4):
        recording.record_checkpoint(
            world.db, claim.claim_id, step=step, artifact=manifest(f"c{step}", kind="checkpoint")
        )

    listed = client.get(f"{JOBS}/{claim.job.id}/checkpoints").json()["data"]

    found = {one["step_number"]: (one["metrics"]["train_loss"], one["metrics"]["full_valid_loss"]) for one in listed}
    assert found == {2: (1.5, 0.7), 3: (1.0, None), 4: (None, None)}


def test_why_explains_a_waiting_job(client: TestClient, world: World) -> None:
    why = client.get(f"{JOBS}/{world.submit().id}/why").json()

    assert why["state"] == "validating_files"
    assert "No worker is running" in why["explanation"]


def test_data_report_appears_after_preparation(client: TestClient, world: World) -> None:
    job = world.submit()
    before = client.get(f"{JOBS}/{job.id}/data_report").json()

    world.prepare_all()

    after = client.get(f"{JOBS}/{job.id}/data_report").json()
    of_file = client.get(f"/v1/files/{world.file_id}/report", params={"model": "smol"}).json()
    assert (before["training"], after["training"], after["validation"]) == (None, REPORT, None)
    assert of_file["report"] == REPORT


def test_rejected_file_shows_its_rejection_report(client: TestClient, world: World) -> None:
    job = world.submit()
    unprepared = begin_preparation(world.db, "w")
    assert unprepared is not None
    wanted, report = unprepared.files, {"refusal": {"code": "masked"}}
    world.put_tokens(wanted.train_key, file_digest=wanted.training.digest, artifact=None, report=report)
    error = {"code": "masked", "message": "Only masked rows."}
    preparation.refuse(world.db, unprepared.task, error=error)

    shown = client.get(f"{JOBS}/{job.id}").json()
    report = client.get(f"{JOBS}/{job.id}/data_report").json()

    assert shown["status"] == "failed"
    assert (shown["error"]["code"], shown["error"]["param"]) == ("masked", "training_file")
    assert shown["error"]["message"] == "Only masked rows."
    assert report["training"] == {"refusal": {"code": "masked"}}


def test_report_for_an_unknown_model_names_available_models(client: TestClient, world: World) -> None:
    response = client.get(f"/v1/files/{world.file_id}/report", params={"model": "none"})

    assert response.status_code == 404
    assert "smol" in error_of(response)["message"]

"""Base models, the queue, workers and metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from api.deps import Services
from catalog.error_texts import ErrorText
from catalog.errors import Unavailable
from catalog.fleet import workers
from catalog.lifecycle import recording
from catalog.tables.fleet import SILENT_SECONDS, Worker
from tests.api.site import error_of
from tests.api.trained import CONTENT, stored_weights
from tests.catalog.world import World, manifest


def test_base_model_is_added_and_shows_its_import_state(operator: TestClient, client: TestClient, world: World) -> None:
    body = {"name": "mine", "kind": "folder", "source": "/models/mine"}

    added = operator.post("/v1/models", json=body).json()
    again = operator.post("/v1/models", json=body).json()
    world.fail_import("mine", {"code": "no_such_folder", "message": "Gone.", "remedy": "Fix it."})
    failed = client.get("/v1/models/mine").json()

    assert added == again
    assert (added["state"], added["kind"], added["source"]) == ("importing", "base", "/models/mine")
    assert (failed["state"], failed["error"]["code"]) == ("failed", "no_such_folder")
    assert failed["source"] is None
    assert {model["id"]: model["state"] for model in client.get("/v1/models").json()["data"]} == {
        "mine": "failed",
        "smol": "ready",
    }


def test_import_failure_details_are_shown_only_to_operators(
    client: TestClient, operator: TestClient, world: World
) -> None:
    operator.post("/v1/models", json={"name": "mine", "kind": "folder", "source": "/secret/mine"})
    failure = {"code": "crashed", "message": "OSError in /secret/mine/model.safetensors", "remedy": "Fix /secret."}
    world.fail_import("mine", failure)

    answers = [
        client.get("/v1/models/mine"),
        client.get("/v1/models"),
        client.post("/v1/fine_tuning/jobs", json={"model": "mine", "training_file": world.file_id}),
    ]

    assert all("secret" not in answer.text and "crashed" in answer.text for answer in answers)
    assert error_of(answers[2])["code"] == "import_failed"
    assert answers[0].json()["error"]["remedy"]
    assert operator.get("/v1/models/mine").json()["error"].items() >= failure.items()


def test_another_source_under_the_same_name_is_a_conflict(operator: TestClient, world: World) -> None:
    response = operator.post("/v1/models", json={"name": "smol", "kind": "hub", "source": "org/other"})

    assert response.status_code == 409
    assert error_of(response)["code"] == "already_exists"


def test_unknown_model_is_not_found(client: TestClient, world: World) -> None:
    for name in ("none", "ft:none", "ft:none:ckpt-step-1"):
        response = client.get(f"/v1/models/{name}")

        assert response.status_code == 404
        error_of(response)


def test_operator_deletes_a_base_model_that_no_job_waits_for(
    client: TestClient, operator: TestClient, world: World
) -> None:
    job = world.submit()

    refused = [client.delete("/v1/models/smol"), operator.delete("/v1/models/smol")]
    client.post(f"/v1/fine_tuning/jobs/{job.id}/cancel")
    deleted = operator.delete("/v1/models/smol")
    afterwards = [operator.delete("/v1/models/smol"), client.get("/v1/models/smol")]

    assert [response.status_code for response in refused] == [403, 409]
    assert [error_of(response)["code"] for response in refused] == ["operator_required", "in_use"]
    assert f"in use by job {job.id} (project 'ours')" in error_of(refused[1])["message"]
    assert deleted.json() == {"id": "smol", "object": "model", "deleted": True}
    assert [response.status_code for response in afterwards] == [404, 404]
    assert client.get("/v1/models").json()["data"] == []
    assert client.get(f"/v1/fine_tuning/jobs/{job.id}").json()["model"] == "smol"


def test_checkpoint_is_a_model_with_files_until_deleted(
    client: TestClient, services: Services, world: World, tmp_path: Path
) -> None:
    world.worker()
    claim = world.running(suffix="docs")
    files, exported = manifest("c", kind="checkpoint"), stored_weights(services, tmp_path / "weights")
    recording.record_checkpoint(world.db, claim.claim_id, step=5, artifact=files, exported=exported)
    name = f"ft:smol:ours:docs:{claim.job.id[-8:]}:ckpt-step-5"

    model, adapter = (client.get(f"/v1/{kind}/{name}").json() for kind in ("models", "adapters"))
    content = client.get(f"/v1/adapters/{name}/files/README.md").content
    listed = client.get("/v1/models").json()["data"]
    deleted = client.delete(f"/v1/models/{name}").json()
    gone = [error_of(client.get(f"/v1/{kind}/{name}")) for kind in ("models", "adapters")]

    assert (model["kind"], model["base"]) == ("checkpoint", "smol")
    assert (adapter["checkpoint_step"], adapter["verification"]["passed"], content) == (5, None, CONTENT["README.md"])
    assert model in listed
    assert client.get("/v1/adapters").json()["data"] == []
    assert deleted == {"id": name, "object": "model", "deleted": True}
    assert {error["code"] for error in gone} == {"checkpoint_expired"}
    assert [error["param"] for error in gone] == ["model", "adapter"]
    again = error_of(client.delete(f"/v1/models/{name}"))
    assert (again["remedy"], again["param"]) == ("No action is needed.", "model")
    (shown,) = client.get(f"/v1/fine_tuning/jobs/{claim.job.id}/checkpoints").json()["data"]
    assert (shown["fine_tuned_model_checkpoint"], shown["available"]) == (name, False)


def test_queue_shows_positions_and_workers_show_their_base_model(
    client: TestClient, operator: TestClient, world: World
) -> None:
    world.worker()
    running = world.running()
    first, second = world.queued(priority="urgent"), world.queued()
    workers.worker_beat(
        world.db, "w1", resident_base=running.job.base_digest, trainer_id="trainer-w1", report={"tokens_per_second": 9}
    )

    queue = client.get("/v1/queue").json()
    (seen,) = client.get("/v1/workers").json()["data"]
    (by_operator,) = operator.get("/v1/workers").json()["data"]

    places = {entry["job_id"]: entry["position"] for entry in queue["jobs"]}
    assert places[running.job.id] is None
    assert places[first.id] < places[second.id]
    assert queue["counts"] == {"running": 1, "queued": 2}
    assert (seen["state"], seen["resident_base_names"], seen["host"]) == ("busy", ["smol"], None)
    assert (by_operator["host"], by_operator["report"]) == ("here", {"tokens_per_second": 9})
    with world.db.write() as session:
        session.get_one(Worker, "w1").heartbeat_at -= SILENT_SECONDS + 1
    (lost,) = client.get("/v1/workers").json()["data"]
    assert (lost["state"], lost["resident_base_names"], lost["resident_base"]) == ("lost", [], None)
    assert lost["trainer_id"] is None, "the trainer of a lost worker is unknown"


def test_worker_without_a_running_job_is_idle_for_every_viewer(
    client: TestClient, operator: TestClient, stranger: TestClient, anonymous: TestClient, world: World
) -> None:
    world.worker("w1")
    world.worker("w2")
    claim = world.running()
    for worker_id in ("w1", "w2"):
        workers.worker_beat(
            world.db, worker_id, resident_base=claim.job.base_digest, trainer_id=f"t-{worker_id}", report=None
        )

    def states() -> list[dict[str, str]]:
        answers = [viewer.get("/v1/workers").json()["data"] for viewer in (client, operator, stranger)]
        return [{worker["id"]: worker["state"] for worker in data} for data in answers]

    assert states() == [{"w1": "busy", "w2": "idle"}] * 3

    world.complete(claim.claim_id)

    assert states() == [{"w1": "idle", "w2": "idle"}] * 3
    assert 'lorry_workers{state="idle"} 2.0' in anonymous.get("/metrics").text


def test_operator_cordons_and_drains_workers_and_all_see_the_reason(
    client: TestClient, operator: TestClient, world: World
) -> None:
    world.worker("w1")
    world.worker("w2")

    cordoned = operator.post("/v1/workers/w1/cordon", json={"reason": "Its fan is loud."})
    drained = operator.post("/v1/workers/w2/drain")
    listed = {one["id"]: one for one in client.get("/v1/workers").json()["data"]}

    assert (cordoned.status_code, cordoned.json()["state"]) == (200, "idle")
    assert cordoned.json()["cordon"]["evidence"] == []
    assert drained.json()["state"] == "draining"
    assert (listed["w1"]["cordon"]["by"], listed["w1"]["cordon"]["reason"]) == ("operator", "Its fan is loud.")
    assert listed["w1"]["cordon"]["evidence"] is None
    assert listed["w2"]["cordon"]["reason"] == "It was drained."
    assert operator.post("/v1/workers/w1/uncordon").json()["cordon"] is None
    assert "lorry_workers_cordoned 1.0" in operator.get("/metrics").text


def test_invalid_cordon_requests_are_rejected(client: TestClient, operator: TestClient, world: World) -> None:
    world.worker("gone")
    workers.end_worker(world.db, "gone")

    for verb in ("cordon", "uncordon", "drain"):
        assert error_of(client.post(f"/v1/workers/gone/{verb}"))["code"] == "operator_required"
        assert error_of(operator.post(f"/v1/workers/none/{verb}"))["code"] == "worker_not_found"
    assert error_of(operator.post("/v1/workers/gone/cordon"))["code"] == "invalid_transition"
    assert error_of(operator.post("/v1/workers/gone/cordon", json={"reason": ""}))["param"] == "reason"


def test_readiness_names_the_unavailable_dependency(
    anonymous: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = anonymous.get("/readyz")

    def away() -> None:
        raise Unavailable(ErrorText(code="store_unavailable", message="The store does not answer.", remedy=""))

    monkeypatch.setattr(services.store, "check_reachable", away)
    unready = anonymous.get("/readyz")

    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    assert unready.status_code == 503
    assert unready.json() == {"status": "unavailable", "database": "ok", "store": "unavailable"}
    assert anonymous.get("/healthz").json() == {"status": "ok"}


def test_metrics_have_bounded_labels(anonymous: TestClient, client: TestClient, world: World) -> None:
    job = world.submit()
    client.get(f"/v1/fine_tuning/jobs/{job.id}")
    client.get(f"/v1/fine_tuning/jobs/{job.id}/events")
    client.get("/v1/nowhere/secret-path")
    anonymous.get("/dashboard/index.html")
    client.request("BREW", "/v1/files")

    response = anonymous.get("/metrics")

    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    requests = {
        (sample.labels["method"], sample.labels["route"], sample.labels["status"])
        for sample in families["lorry_http_requests"].samples
    }
    assert ("GET", "/v1/fine_tuning/jobs/{job_id}", "200") in requests
    assert ("GET", "/v1/fine_tuning/jobs/{job_id}/events", "200") in requests
    assert ("GET", "unmatched", "404") in requests
    assert ("GET", "/dashboard", "200") in requests
    assert "other" in {method for method, _, _ in requests}
    assert "secret-path" not in response.text
    assert job.id not in response.text
    by_state = {
        (sample.labels["state"], sample.labels["priority"]): sample.value for sample in families["lorry_jobs"].samples
    }
    assert by_state["validating_files", "normal"] == 1
    assert by_state["running", "normal"] == by_state["validating_files", "urgent"] == 0
    assert families["lorry_job_events"].samples[0].value >= 1
    assert "lorry_workers" in families


def test_metrics_require_loopback_or_an_operator_key(
    app: FastAPI, anonymous: TestClient, client: TestClient, operator: TestClient
) -> None:
    far = TestClient(app, base_url="http://127.0.0.1", client=("203.0.113.7", 5))
    strangers = [far.get("/metrics"), anonymous.get("/metrics", headers={"x-forwarded-for": "203.0.113.7"})]

    assert [response.status_code for response in strangers] == [401, 401]
    assert client.get("/metrics").status_code == 403
    assert operator.get("/metrics").status_code == 200


def test_metrics_with_a_public_url_require_a_key_even_on_loopback(
    app: FastAPI, anonymous: TestClient, operator: TestClient, services: Services
) -> None:
    """A proxy that adds no forwarding header makes every remote client look local."""
    public = services.api_settings.model_copy(update={"public_url": "https://lorry.example"})
    app.state.services = dataclasses.replace(services, api_settings=public)

    refused = anonymous.get("/metrics")
    assert (refused.status_code, error_of(refused)["code"]) == (401, "missing_api_key")
    assert "because LORRY_PUBLIC_URL is set" in error_of(refused)["message"]
    assert operator.get("/metrics").status_code == 200


def test_hub_id_as_a_model_name_suggests_models_add(operator: TestClient, world: World) -> None:
    wanted = "HuggingFaceTB/SmolLM2-135M"
    job = {"model": wanted, "training_file": world.file_id}

    refused = [
        error_of(operator.get(f"/v1/models/{wanted}")),
        error_of(operator.delete(f"/v1/models/{wanted}")),
        error_of(operator.post("/v1/fine_tuning/jobs", json=job)),
    ]

    for error in refused:
        assert error["code"] == "model_not_found"
        assert "lorry models add smollm2-135m HuggingFaceTB/SmolLM2-135M`." in error["remedy"]
        assert "available base models: smol." in error["remedy"]

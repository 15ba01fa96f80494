"""Reproduction of adapters: the job that the route creates, its inputs by digest, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from api.deps import Services
from catalog.queue.claiming import Claim
from catalog.registry import lineage
from catalog.states import PriorityClass
from catalog.storage import files as stored_files
from catalog.tables.storage import Adapter, BaseModelRow, File
from catalog.tables.tenancy import ApiKey, Project
from tests.api import trained
from tests.api.site import error_of
from tests.api.trained import BASE, solid_base
from tests.catalog.world import World, request, sha

SETTINGS: dict[str, Any] = {"seed": 7, "lora": {"rank": 8}, "suffix": "docs", "metadata": {"team": "a"}}
MACHINE = {"device": "cpu", "invariance": "bitwise"}


@pytest.fixture
def adapter(services: Services, world: World, tmp_path: Path) -> Adapter:
    world.worker()
    solid_base(world)
    claim = world.running(model=BASE, deadline=2_000_000_000, **SETTINGS)
    return complete(services, world, claim, tmp_path / "made")


def complete(services: Services, world: World, claim: Claim, folder: Path, *, weights: bytes = b"w") -> Adapter:
    return trained.complete(services, world, claim, folder, weights=weights, trainer=MACHINE)


def reproduced(client: TestClient, adapter: Adapter) -> dict[str, Any]:
    response = client.post(f"/v1/adapters/{adapter.name}/reproduce")
    assert response.status_code == 200, response.text
    return response.json()


def test_the_job_has_the_recorded_configuration_and_no_private_data(
    client: TestClient, adapter: Adapter, world: World
) -> None:
    first = client.get(f"/v1/fine_tuning/jobs/{adapter.job_id}").json()

    job = reproduced(client, adapter)

    same = ("model", "base_digest", "training_file", "seed", "lora", "optimizer", "schedule", "precision", "method")
    assert {name: job[name] for name in same} == {name: first[name] for name in same}
    assert world.job(job["id"]).spec == world.job(adapter.job_id).spec
    assert (job["suffix"], job["metadata"], job["deadline"]) == ("reproduced", None, None)
    assert job["reproduces"] == {
        "adapter": adapter.id,
        "name": adapter.name,
        "lineage_id": adapter.lineage_id,
        "expected": {"weights": sha("w"), "loss_log": sha("losses")},
        **dict.fromkeys(("reproduced", "identical", "differences", "machines", "is_difference_expected", "message")),
    }
    assert first["reproduces"] is None


@pytest.mark.parametrize("weights", [b"w", b"other"])
def test_the_finished_job_shows_whether_the_digests_are_equal(
    client: TestClient, adapter: Adapter, services: Services, world: World, tmp_path: Path, weights: bytes
) -> None:
    job = reproduced(client, adapter)
    world.prepare_all()
    (claim,) = world.claim()

    complete(services, world, claim, tmp_path / "again", weights=weights)

    found = client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["reproduces"]
    assert found["identical"] is (weights == b"w")
    assert found["reproduced"]["weights"] == sha(weights.decode())
    (machine,) = found["machines"]["reproduced"]
    assert (machine["attempt"], machine["worker"], machine["from_step"], machine["device"]) == (1, "w1", 0, "cpu")
    events = client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    (event,) = [each for each in events if each["message"] == found["message"]]
    assert event["level"] == ("info" if weights == b"w" else "warn")


def test_a_repeated_request_with_the_same_key_creates_one_job(client: TestClient, adapter: Adapter) -> None:
    path, headers = f"/v1/adapters/{adapter.id}/reproduce", {"idempotency-key": "one"}

    first, again, other = (client.post(path, headers=given).json() for given in (headers, headers, {}))

    assert first["id"] == again["id"] != other["id"]


@pytest.mark.parametrize("limited", ["key", "project"])
def test_a_key_that_is_limited_to_batch_priority_reproduces_at_that_priority(
    client: TestClient, adapter: Adapter, world: World, limited: str
) -> None:
    assert reproduced(client, adapter)["priority"] == "normal"
    with world.db.write() as session:
        if limited == "key":
            session.execute(update(ApiKey).values(highest_priority=PriorityClass.batch))
        else:
            session.get_one(Project, world.caller.project_id).highest_priority = PriorityClass.batch

    assert reproduced(client, adapter)["priority"] == "batch"


def test_a_deleted_file_is_found_again_by_its_digest(client: TestClient, adapter: Adapter, world: World) -> None:
    source = world.job(adapter.job_id).training_file
    stored_files.delete(world.db, project_id=world.caller.project_id, file_id=source)
    with world.db.write() as session:
        gone = session.get_one(File, source)
        about = {
            name: getattr(gone, name) for name in ("project_id", "purpose", "kind", "num_bytes", "num_rows", "digest")
        }
        session.add(File(id="file-again", filename="renamed.jsonl", created_at=gone.created_at + 1, **about))

    job = reproduced(client, adapter)

    assert job["training_file"] == "file-again"


def test_all_missing_inputs_are_listed_with_the_ways_to_supply_them(
    client: TestClient, adapter: Adapter, world: World
) -> None:
    source = world.job(adapter.job_id).training_file
    stored_files.delete(world.db, project_id=world.caller.project_id, file_id=source)
    with world.db.write() as session:
        session.get_one(BaseModelRow, BASE).state = "deleted"

    response = client.post(f"/v1/adapters/{adapter.id}/reproduce")

    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (409, "not_reproducible", "adapter")
    assert f"the base model 'solid' with the digest {adapter.base_digest}" in error["message"]
    assert f"the training file with the SHA-256 digest {sha(source)} (10 bytes)" in error["message"]
    assert "Upload a missing file again" in error["remedy"]
    assert "add a missing base model again" in error["remedy"]


def test_a_base_model_with_another_name_and_the_same_digest_is_used(
    client: TestClient, adapter: Adapter, world: World
) -> None:
    with world.db.write() as session:
        first = session.get_one(BaseModelRow, BASE)
        kept = {name: getattr(first, name) for name in ("kind", "source", "digest", "manifest", "description")}
        session.add(BaseModelRow(name="renamed", state="ready", created_at=first.created_at, **kept))
        first.state = "deleted"

    assert reproduced(client, adapter)["model"] == "renamed"


def test_a_file_of_another_project_is_not_used(client: TestClient, adapter: Adapter, world: World) -> None:
    source = world.job(adapter.job_id).training_file
    with world.db.write() as session:
        session.get_one(File, source).project_id = world.stranger.project_id

    response = client.post(f"/v1/adapters/{adapter.id}/reproduce")

    assert error_of(response)["code"] == "not_reproducible"


def test_a_deleted_parent_adapter_is_a_missing_input(
    client: TestClient, adapter: Adapter, services: Services, world: World, tmp_path: Path
) -> None:
    world.send(request(model=BASE, training_file=world.file_id, parent_adapter=adapter.id, seed=1))
    world.prepare_all()
    (claim,) = world.claim()
    child = complete(services, world, claim, tmp_path / "child")
    job = reproduced(client, child)
    assert job["parent_adapter"] == adapter.name
    client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/adapters/{adapter.id}").status_code == 200

    error = error_of(client.post(f"/v1/adapters/{child.id}/reproduce"))

    assert f"the parent adapter {adapter.name!r}" in error["message"]


def test_a_changed_lineage_record_is_not_reproduced(client: TestClient, adapter: Adapter, world: World) -> None:
    with world.db.write() as session:
        row = session.get_one(Adapter, adapter.id)
        row.lineage = {**row.lineage, "job": "ftjob-other"}

    response = client.post(f"/v1/adapters/{adapter.id}/reproduce")

    assert (response.status_code, error_of(response)["code"]) == (409, "not_reproducible")


def test_a_configuration_that_resolves_otherwise_is_rejected(
    client: TestClient, adapter: Adapter, world: World
) -> None:
    with world.db.write() as session:
        row = session.get_one(Adapter, adapter.id)
        record = json.loads(json.dumps(row.lineage))
        record["config"]["resolved"]["optimizer"]["beta1"] = 0.5
        row.lineage, row.lineage_id = record, lineage.lineage_id(record)

    error = error_of(client.post(f"/v1/adapters/{adapter.id}/reproduce"))

    assert error["code"] == "not_reproducible"
    assert "optimizer.beta1 0.9 instead of 0.5" in error["message"]

"""Routes of trained adapters: retrieve, download, lineage, verify, delete, and use as a model."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import rfc8785
from sqlalchemy import event
from starlette.testclient import TestClient

from api.deps import Services
from catalog.registry import adapters
from catalog.storage.store import blob_key
from catalog.tables.storage import Adapter
from lorry.verification.adapter_folder import verify_folder
from tests.api.site import error_of
from tests.api.trained import BASE, CONTENT
from tests.catalog.world import World


def test_adapter_is_found_by_id_and_by_name(client: TestClient, adapter: Adapter) -> None:
    by_id = client.get(f"/v1/adapters/{adapter.id}").json()
    by_name = client.get(f"/v1/adapters/{adapter.name}").json()

    assert by_id == by_name
    assert client.get("/v1/adapters").json()["data"] == [by_id]
    assert (by_id["rank"], by_id["num_parameters"], by_id["job_id"]) == (16, 10, adapter.job_id)
    assert by_id["bytes"] == sum(map(len, CONTENT.values()))
    assert by_id["verification"]["passed"] is True
    assert by_id["evaluation"]["perplexity"] == 2.7


def test_file_list_lets_clients_check_the_artifact_digest(client: TestClient, adapter: Adapter) -> None:
    listed = client.get(f"/v1/adapters/{adapter.id}/files").json()

    canonical = rfc8785.dumps({"files": listed["data"], "kind": listed["kind"]})
    assert hashlib.sha256(canonical).hexdigest() == listed["artifact"] == adapter.artifact
    for row in listed["data"]:
        response = client.get(f"/v1/adapters/{adapter.id}/files/{row['path']}")
        assert response.content == CONTENT[row["path"]]
        assert hashlib.sha256(response.content).hexdigest() == row["digest"]
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("path", ["none.bin", "../../pepper", "%2e%2e/pepper", "/etc/passwd"])
def test_unknown_and_traversal_paths_are_not_found(client: TestClient, adapter: Adapter, path: str) -> None:
    response = client.get(f"/v1/adapters/{adapter.id}/files/{path}")

    assert response.status_code == 404
    error_of(response)


def test_unknown_file_error_names_the_adapter_and_its_files(client: TestClient, adapter: Adapter) -> None:
    error = error_of(client.get(f"/v1/adapters/{adapter.id}/files/none.bin"))

    assert (error["code"], error["param"]) == ("adapter_not_found", "path")
    assert f"{adapter.id!r} does not contain the file 'none.bin'" in error["message"]
    assert "adapter_config.json" in error["remedy"]


def test_archive_is_a_reproducible_tar_that_verifies_offline(
    client: TestClient, adapter: Adapter, tmp_path: Path
) -> None:
    response = client.get(f"/v1/adapters/{adapter.name}/archive")
    again = client.get(f"/v1/adapters/{adapter.name}/archive")

    assert response.content == again.content
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["content-type"] == "application/x-tar"
    assert f"{adapter.name.replace(':', '-')}.tar" in response.headers["content-disposition"]
    folder = tmp_path / "pulled"
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        tar.extractall(folder, filter="data")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in CONTENT} == CONTENT
    assert verify_folder(folder) == {**verify_folder(folder), "passed": True, "problems": []}


def test_lineage_id_is_the_digest_of_the_lineage_record(client: TestClient, adapter: Adapter) -> None:
    found = client.get(f"/v1/adapters/{adapter.id}/lineage").json()

    assert hashlib.sha256(rfc8785.dumps(found["lineage"])).hexdigest() == found["lineage_id"] == adapter.lineage_id
    assert found["lineage"]["outputs"]["artifact"] == adapter.artifact


def test_verification_detects_a_changed_file(client: TestClient, adapter: Adapter, services: Services) -> None:
    before = client.post(f"/v1/adapters/{adapter.id}/verify").json()
    digest = hashlib.sha256(CONTENT["adapter_model.safetensors"]).hexdigest()
    folder = services.store.objects.folder
    assert folder is not None
    (folder / blob_key(digest)).write_bytes(b"tampered")

    after = client.post(f"/v1/adapters/{adapter.id}/verify").json()

    assert (before["passed"], before["problems"]) == (True, [])
    assert after["passed"] is False
    assert "adapter_model.safetensors" in json.dumps(after["problems"])


def test_file_missing_from_the_store_returns_artifact_damaged(
    client: TestClient, adapter: Adapter, services: Services
) -> None:
    digest = hashlib.sha256(CONTENT["README.md"]).hexdigest()
    folder = services.store.objects.folder
    assert folder is not None
    (folder / blob_key(digest)).unlink()

    response = client.get(f"/v1/adapters/{adapter.id}/files/README.md")

    assert response.status_code == 500
    assert error_of(response)["code"] == "artifact_damaged"


def test_adapter_is_a_model_that_can_be_deleted(client: TestClient, stranger: TestClient, adapter: Adapter) -> None:
    model = client.get(f"/v1/models/{adapter.name}").json()
    listed = client.get("/v1/models").json()["data"]

    assert model in listed
    assert (model["kind"], model["base"], model["digest"]) == ("adapter", BASE, adapter.artifact)
    assert [entry["id"] for entry in stranger.get("/v1/models").json()["data"]] == ["smol", BASE]
    assert stranger.delete(f"/v1/models/{adapter.name}").status_code == 404
    assert client.delete(f"/v1/models/{adapter.name}").json()["deleted"] is True
    for path in (f"/v1/models/{adapter.name}", f"/v1/adapters/{adapter.id}", f"/v1/adapters/{adapter.id}/archive"):
        assert client.get(path).status_code == 404
    assert client.get(f"/v1/fine_tuning/jobs/{adapter.job_id}").json()["adapter_id"] is None


def test_adapter_survives_deletion_of_its_base_model(
    client: TestClient, operator: TestClient, adapter: Adapter, world: World
) -> None:
    paths = ["", "/files", "/lineage"]
    before = [client.get(f"/v1/adapters/{adapter.id}{path}").json() for path in paths]

    assert operator.delete(f"/v1/models/{BASE}").status_code == 200
    operator.post("/v1/models", json={"name": BASE, "kind": "hub", "source": "org/other"})

    assert [client.get(f"/v1/adapters/{adapter.id}{path}").json() for path in paths] == before
    assert client.post(f"/v1/adapters/{adapter.id}/verify").json()["passed"] is True
    assert client.get(f"/v1/adapters/{adapter.id}/archive").status_code == 200
    assert client.get(f"/v1/models/{adapter.name}").json()["base"] == BASE


def test_lineage_links_parent_and_child_and_training_locks_parent(
    client: TestClient, world: World, adapter: Adapter
) -> None:
    body = {"model": adapter.name, "training_file": world.file_id, "seed": 3}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    assert (job["parent_adapter"], job["model"]) == (adapter.name, BASE)

    for path in (f"/v1/adapters/{adapter.id}", f"/v1/models/{adapter.name}"):
        refused = client.delete(path)
        assert refused.status_code == 409
        assert error_of(refused)["code"] == "in_use"
    assert client.get(f"/v1/adapters/{adapter.id}/lineage").json()["children"] == []

    world.prepare_all()
    (claim,) = world.claim()
    child = world.complete(claim.claim_id, "child")

    assert client.get(f"/v1/adapters/{adapter.id}/lineage").json()["children"] == [child.name]
    assert client.get(f"/v1/adapters/{adapter.id}").json()["parent"] is None
    assert client.delete(f"/v1/adapters/{adapter.id}").status_code == 200


def test_archive_contains_only_the_immutable_lineage_record(client: TestClient, adapter: Adapter) -> None:
    content = client.get(f"/v1/adapters/{adapter.id}/archive").content

    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        member = archive.extractfile("lineage.json")
        assert member is not None
        assert set(json.load(member)) == {"object", "adapter_id", "lineage_id", "lineage", "signature"}


def test_name_of_a_model_of_openai_is_explained(client: TestClient, adapter: Adapter) -> None:
    of_openai, unknown = "ft:gpt-4o-mini-2024-07-18:acme::abc", f"{adapter.name}x"

    messages = [client.get(f"/v1/adapters/{name}").json()["error"]["message"] for name in (of_openai, unknown)]

    assert "fine-tuned models can't be used here: create a job with the same file" in messages[0]
    assert "OpenAI" not in messages[1]


def test_model_list_reads_no_lineage_records_and_has_a_limit(
    services: Services, world: World, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: list[str] = []
    event.listen(services.db.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    models = adapters.list_models(services.db, project_id=adapter.project_id)
    none = adapters.list_models(services.db, project_id=adapter.project_id, limit=0)
    adapters.list_checkpoint_models(services.db, project_id=adapter.project_id)

    assert [row.name for row in models.items] == [adapter.name]
    assert (models.has_more, none.items, none.has_more) == (False, [], True)
    assert not [statement for statement in statements if "lineage," in statement or "spec" in statement]
    assert all("LIMIT" in statement for statement in statements if "FROM" in statement and "JOIN" not in statement)


def test_adapter_is_compared_with_full_fine_tuning(client: TestClient, adapter: Adapter) -> None:
    found = client.get(f"/v1/adapters/{adapter.id}").json()["efficiency"]

    assert found["parameters"] == {"trainable": 10, "base": 10_000, "share": 0.001}
    assert found["size"] == {"bytes": len(CONTENT["adapter_model.safetensors"]), "base_bytes": None, "share": None}
    memory = found["training_memory"]
    assert memory["full_fine_tuning"]["weights"] == 20_000
    assert memory["lora"]["weights"] == 20_020
    assert memory["share"] == memory["lora"]["total"] / memory["full_fine_tuning"]["total"]
    assert (memory["measured"], found["inference_latency"]) == (None, None)


def test_adapter_without_a_described_base_model_is_not_compared(
    client: TestClient, adapter: Adapter, services: Services
) -> None:
    with services.db.write() as session:
        session.get_one(Adapter, adapter.id).lineage = {}

    assert client.get(f"/v1/adapters/{adapter.id}").json()["efficiency"] is None

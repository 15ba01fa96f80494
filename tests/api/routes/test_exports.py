"""Routes of exports: create, list, show, cancel, delete, and download their files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.deps import Services
from catalog.exports import commands
from catalog.exports.commands import ExportResult
from catalog.registry import adapters
from catalog.registry.efficiency import inference_latency
from catalog.settings import Settings
from catalog.tables.storage import Adapter
from catalog.tasks.task_queue import TaskKind
from tests.api.site import error_of
from tests.catalog.world import claim_task

FILES = {"model.gguf": bytes(range(256)) * 5_000, "Modelfile": b"FROM ./model.gguf\n"}
MERGE = {"max_abs_diff_to_trained": 0.5}


def finish(services: Services, folder: Path) -> None:
    """Make the waiting export, as a worker does."""
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    claim = commands.begin(services.db, claim_task(services.db, TaskKind.EXPORT))
    assert claim is not None
    cost = {"base_seconds": 0.2, "merged_seconds": 0.2, "num_tokens": 128, "same_operations": True}
    verification = {"max_abs_diff": 0.25, "tolerance": 1.0, "max_abs_logit": 9.0, "merge": MERGE}
    manifest = services.store.put_folder(folder, kind="export")
    done = ExportResult(manifest=manifest, verification=verification, cost=cost, hub_url=None)
    commands.finish(services.db, claim.task, done)


def test_export_is_created_once_shown_and_downloaded(
    client: TestClient, services: Services, adapter: Adapter, tmp_path: Path
) -> None:
    url = f"/v1/adapters/{adapter.name}/exports"
    body = {"format": "gguf", "quantization": "f16"}
    created = client.post(url, json=body).json()
    assert (created["status"], created["adapter"], created["quantization"]) == ("queued", adapter.id, "f16")
    assert client.post(url, json=body).json()["id"] == created["id"]
    not_ready = error_of(client.get(f"{url}/{created['id']}/files"))
    assert (not_ready["code"], "lorry adapters exports" in not_ready["remedy"]) == ("not_ready", True)

    finish(services, tmp_path / "files")

    shown = client.get(f"{url}/{created['id']}").json()
    assert client.get(url).json()["data"] == [shown]
    assert shown["status"] == "succeeded"
    assert shown["bytes"] == sum(map(len, FILES.values()))
    assert shown["verification"]["max_abs_diff"] == 0.25
    assert shown["verification"]["max_abs_diff_to_trained"] == 0.5
    assert shown["cost"]["same_operations"] is True
    measured = adapters.get(services.db, project_id=adapter.project_id, name=adapter.id).cost
    assert inference_latency(measured) == {"base_seconds": 0.2, "merged_seconds": 0.2, "ratio": 1.0}
    listed = client.get(f"{url}/{created['id']}/files").json()
    assert (listed["kind"], listed["artifact"]) == ("export", shown["artifact"])
    for row in listed["data"]:
        response = client.get(f"{url}/{created['id']}/files/{row['path']}")
        assert response.content == FILES[row["path"]]
        assert hashlib.sha256(response.content).hexdigest() == row["digest"]
        assert response.headers["content-disposition"].startswith("attachment")


def test_unknown_file_of_an_export_names_its_files(
    client: TestClient, services: Services, adapter: Adapter, tmp_path: Path
) -> None:
    url = f"/v1/adapters/{adapter.id}/exports"
    created = client.post(url, json={"format": "gguf"}).json()
    finish(services, tmp_path / "files")

    error = error_of(client.get(f"{url}/{created['id']}/files/none.bin"))

    assert (error["code"], error["param"]) == ("export_not_found", "path")
    assert "Modelfile, model.gguf" in error["remedy"]


def test_export_is_cancelled_and_deleted(client: TestClient, adapter: Adapter) -> None:
    url = f"/v1/adapters/{adapter.id}/exports"
    created = client.post(url, json={"format": "merged"}).json()

    assert client.post(f"{url}/{created['id']}/cancel").json()["status"] == "cancelled"
    deleted = client.delete(f"{url}/{created['id']}").json()

    assert deleted == {"id": created["id"], "object": "adapter.export", "deleted": True}
    assert client.get(f"{url}/{created['id']}").status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "format"),
        ({"format": "onnx"}, "format"),
        ({"format": "gguf", "quantization": "q4_0"}, "quantization"),
        ({"format": "merged", "quantization": "f16"}, "quantization"),
        ({"format": "gguf-lora", "quantization": "q8_0"}, "quantization"),
        ({"format": "adapter"}, "format"),
        ({"format": "merged", "hub_repository": "no-organization"}, "hub_repository"),
        ({"format": "merged", "hub_repository": "../../etc"}, "hub_repository"),
        ({"format": "merged", "unknown": 1}, "unknown"),
    ],
)
def test_invalid_export_names_the_field(client: TestClient, adapter: Adapter, body: dict[str, Any], param: str) -> None:
    response = client.post(f"/v1/adapters/{adapter.id}/exports", json=body)

    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_upload_needs_a_repository_that_the_operator_lists(
    client: TestClient, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"format": "adapter", "hub_repository": "org/x"}

    response = client.post(f"/v1/adapters/{adapter.id}/exports", json=body)

    assert (response.status_code, error_of(response)["code"]) == (403, "integration_unavailable")
    assert "LORRY_HUB_REPOSITORIES" in error_of(response)["message"]
    monkeypatch.setattr(Settings, "named_hub_repositories", lambda _settings: ("org/*",))
    assert client.post(f"/v1/adapters/{adapter.id}/exports", json=body).status_code == 200

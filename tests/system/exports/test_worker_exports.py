"""A real worker exports a trained adapter. A killed worker's export is made by another one, and an upload arrives."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from catalog.exports import commands
from catalog.registry import adapters
from catalog.storage.manifest import Manifest
from catalog.tables.storage import AdapterExport
from tests.services.uploads_hub import COMMIT, TOKEN, upload_hub
from tests.worker_site import SHORT_LEASE, WAIT_SECONDS, WorkerSite, worker_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[WorkerSite]:
    with worker_site(tmp_path, **SHORT_LEASE) as site:
        yield site


@pytest.fixture
def adapter(site: WorkerSite) -> str:
    """Return the name of a trained adapter."""
    job = site.submit(site.upload(20), max_steps=3, hyperparameters={"batch_size": 4, "learning_rate_multiplier": 10})
    site.work_until_done()
    return site.adapter(job).name


def create(site: WorkerSite, adapter: str, format: Any, **fields: Any) -> AdapterExport:  # noqa: A002
    return commands.create(site.db, caller=site.caller, adapter=adapter, format=format, **fields)


def shown(site: WorkerSite, row: AdapterExport) -> AdapterExport:
    return commands.get(site.db, project_id=row.project_id, adapter=row.adapter_id, export=row.id)


def names(site: WorkerSite, row: AdapterExport) -> set[str]:
    _, artifact = commands.files_of(site.db, project_id=row.project_id, adapter=row.adapter_id, export=row.id)
    assert site.store.verify(Manifest.from_rows(artifact.kind, artifact.files)) == []
    return {file["path"] for file in artifact.files}


def test_worker_exports_in_every_format_and_uploads_to_the_hub(site: WorkerSite, adapter: str) -> None:
    with upload_hub() as hub:
        gguf, lora = create(site, adapter, "gguf"), create(site, adapter, "gguf-lora")
        allowed = {"allowed_repositories": ["org/*"]}
        merged, plain = (
            create(site, adapter, kind, hub_repository=f"org/{kind}", **allowed) for kind in ("merged", "adapter")
        )
        token = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(site.folder / "hf")}
        site.work_until_done(**token, LORRY_HUB_REPOSITORIES="org/*", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")

        gguf, lora, merged, plain = done = [shown(site, row) for row in (gguf, lora, merged, plain)]
        assert [(row.status, row.error) for row in done] == [("succeeded", None)] * 4, site.log()
        assert set(hub.repositories) == {"org/merged", "org/adapter"}
        assert names(site, merged) == set(hub.repositories["org/merged"])
        card = hub.repositories["org/merged"]["README.md"].decode()
        for name in ("Inference latency, merged", "Trained parameters", "Size of the weights", "Memory: activations"):
            assert f"| {name} |" in card
        assert {"adapter_config.json", "adapter_model.safetensors"} < set(hub.repositories["org/adapter"])
        assert hub.private == {"org/merged": True, "org/adapter": True}
        assert plain.hub_url == f"{hub.url}/org/adapter/commit/{COMMIT}"
    stem = re.sub(":+", "-", adapter)
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge.json"} < names(site, merged)
    assert names(site, gguf) == {f"{stem}-q8_0.gguf", "Modelfile", "README.md", "export.json"}
    assert names(site, lora) == {f"{stem}-lora.gguf", "README.md", "export.json"}
    for row in (gguf, lora, merged):
        assert row.verification is not None
        assert 0 <= row.verification["max_abs_diff"] <= row.verification["tolerance"]
        assert row.num_bytes > 0
    assert [row.cost is not None and row.cost["same_operations"] for row in (gguf, lora, merged)] == [True, False, True]
    assert create(site, adapter, "gguf", quantization="q8_0").id == gguf.id, "an identical export is not repeated"


def test_export_of_a_killed_worker_is_made_by_another_one(site: WorkerSite, adapter: str) -> None:
    row = create(site, adapter, "gguf-lora")
    first = site.start_worker(FAILPOINT="before_export_finishes:kill")
    assert first.wait(WAIT_SECONDS) == -signal.SIGKILL, site.log()
    assert shown(site, row).status == "running"

    site.start_worker()
    site.wait_until(lambda: shown(site, row).status == "succeeded")

    assert len(names(site, row)) == 3


def test_worker_stops_a_cancelled_export_and_deletion_of_the_adapter_deletes_its_exports(
    site: WorkerSite, adapter: str
) -> None:
    row, other = create(site, adapter, "gguf-lora"), None
    gate = site.gate("go")
    site.start_worker(FAILPOINT=f"before_export_finishes:wait={gate}")
    site.wait_until(lambda: shown(site, row).status == "running")

    commands.cancel(site.db, project_id=row.project_id, adapter=adapter, export=row.id)
    gate.touch()
    other = create(site, adapter, "merged")
    site.wait_until(lambda: shown(site, other).status == "succeeded")

    assert shown(site, row).status == "cancelled"
    assert shown(site, row).artifact is None
    adapters.delete(site.db, project_id=row.project_id, name=adapter)
    with site.db.read() as session:
        assert list(session.query(AdapterExport)) == []

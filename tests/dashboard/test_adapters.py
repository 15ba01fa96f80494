"""The page of an adapter: lineage, questions, exports and serving endpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import expect

from catalog.exports import commands
from catalog.pepper import Pepper
from catalog.serving import deployments, endpoints
from catalog.serving.endpoints import NewEndpoint
from catalog.storage import files
from catalog.tables.serving import Deployment
from catalog.tasks.task_queue import TaskKind
from qa.fuzz.answering import answering
from tests.catalog.world import claim_task
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service, serving


def test_lineage_shows_the_base_model_license_and_file_names(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "recorded")
    seed.prepare(fresh.seeded)
    adapter_id = seed.succeed(fresh.seeded, seed.claim(fresh.seeded)[job.id])
    files.delete(fresh.seeded.db, project_id=job.project_id, file_id=fresh.seeded.validation.id)
    visitor = visit(fresh)

    visitor.open(f"#/adapters/{adapter_id}")

    lineage = visitor.page.get_by_role("region", name="Lineage")
    lineage.get_by_text("signatures-train.jsonl", exact=False).wait_for()
    lines = lineage.inner_text().split("\n")
    assert lines[lines.index("Base model license") + 1] == "apache-2.0"
    assert f"signatures-train.jsonl {fresh.seeded.training.id}, 320 rows" in lineage.inner_text()
    assert f"{fresh.seeded.validation.id}, 96 rows" in lineage.inner_text()


def test_lineage_shows_how_several_devices_held_the_base_model(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "sharded")
    seed.prepare(fresh.seeded)
    of_four = {"device": "cuda:0", "num_processes": 4, "strategy": "fsdp2"}
    adapter_id = seed.succeed(fresh.seeded, seed.claim(fresh.seeded)[job.id], **of_four)
    visitor = visit(fresh)

    visitor.open(f"#/adapters/{adapter_id}")

    lineage = visitor.page.get_by_role("region", name="Lineage")
    lineage.get_by_text("sharded across 4 GPUs (FSDP2)", exact=True).wait_for()


def test_adapter_is_compared_with_full_fine_tuning_by_component(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "compared")
    seed.prepare(fresh.seeded)
    adapter_id = seed.succeed(fresh.seeded, seed.claim(fresh.seeded)[job.id])
    visitor = visit(fresh)

    visitor.open(f"#/adapters/{adapter_id}")

    panel = visitor.page.get_by_role("region", name="Compared with full fine-tuning")
    table = panel.get_by_role("table")
    table.wait_for()
    rows = {cells[0]: cells[1:] for line in table.inner_text().split("\n") if (cells := line.split("\t"))}
    assert list(rows)[2:] == [
        *("Trained parameters", "Weights file", "Training memory"),
        *("Memory: weights", "Memory: gradients", "Memory: optimizer state", "Memory: activations"),
    ]
    assert rows["Trained parameters"] == ["2.95 M", "135 M", "2.2 %"]
    assert rows["Weights file"][0] == "300 kB"
    assert rows["Training memory"][2].endswith(" %")
    panel.get_by_text("Latency: not measured yet.", exact=False).wait_for()


def test_serving_shows_the_state_and_the_last_error_of_each_endpoint(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "served")
    seed.prepare(fresh.seeded)
    adapter_id = seed.succeed(fresh.seeded, seed.claim(fresh.seeded)[job.id])
    db, project_id = fresh.seeded.db, job.project_id
    for name in ("gpu-1", "gpu-2"):
        new = NewEndpoint(
            name=name, base_model=job.base_model, kind="vllm", url="http://127.0.0.1:9", adapter_folder="/nowhere",
            max_rank=64, api_key=None,
        )  # fmt: skip
        endpoints.register(db, project_id=project_id, new=new, pepper=Pepper(current=b"p" * 32))
    visitor = visit(fresh)

    visitor.open(f"#/adapters/{adapter_id}")
    serving = visitor.page.get_by_role("region", name="Serving")
    serving.get_by_text(f"lorry adapters deploy {adapter_id} --to ENDPOINT").wait_for()
    made = deployments.deploy(db, project_id=project_id, adapter=adapter_id, endpoint="gpu-1").deployment
    deployments.deploy(db, project_id=project_id, adapter=adapter_id, endpoint="gpu-2")
    with db.write() as session:
        row = session.get_one(Deployment, made.id)
        row.state, row.last_error, row.operator_error = "failed", "The server refused it.", None

    serving.get_by_role("row", name="gpu-1").get_by_text("The server refused it.").wait_for()
    assert "failed" in serving.get_by_role("row", name="gpu-1").inner_text()
    assert "gpu-2" in serving.inner_text()


def test_export_is_requested_shown_downloaded_and_deleted(fresh: Service, visit: Visit, tmp_path: Path) -> None:
    job = seed.submit(fresh.seeded, "exported")
    seed.prepare(fresh.seeded)
    adapter_id = seed.succeed(fresh.seeded, seed.claim(fresh.seeded)[job.id])
    visitor = visit(fresh)
    visitor.open(f"#/adapters/{adapter_id}")
    panel = visitor.page.get_by_role("region", name="Exports")

    expect(panel.get_by_label("Upload to")).to_have_count(0)
    panel.get_by_label("Format").select_option("merged")
    panel.get_by_role("button", name="Export", exact=True).click()
    panel.get_by_text("queued").wait_for()
    _make_export(fresh, tmp_path / "files")

    panel.get_by_text("succeeded").wait_for()
    expect(panel).to_contain_text("A pass takes 110 ms merged and 100 ms without the adapter.")
    visitor.assert_accessible()
    with visitor.page.expect_download() as download:
        panel.get_by_role("link", name="model.safetensors").click()
    assert download.value.path().read_bytes() == b"weights"
    panel.get_by_role("button", name="Delete the export merged").click()
    visitor.page.get_by_role("button", name="Delete the export", exact=True).click()
    panel.get_by_role("link", name="model.safetensors").wait_for(state="detached")
    page = commands.list_page(fresh.seeded.db, project_id=job.project_id, adapter=adapter_id)
    assert page.items == []


def test_export_is_requested_with_an_upload_to_the_hub(tmp_path: Path, migrated_database: Path, visit: Visit) -> None:
    shutil.copy(migrated_database, tmp_path / "lorry.db")
    with serving(seed.start(tmp_path), LORRY_HUB_REPOSITORIES="org/*") as service:
        adapter_id = trained(service)
        visitor = visit(service)
        visitor.open(f"#/adapters/{adapter_id}")
        panel = visitor.page.get_by_role("region", name="Exports")
        repository, button = panel.get_by_label("Upload to"), panel.get_by_role("button", name="Export", exact=True)

        panel.get_by_label("Format").select_option("adapter")
        repository.fill("other/support")
        button.click()
        panel.get_by_text("Exports may not be uploaded to 'other/support'").wait_for()
        repository.fill("org/support")
        button.click()

        panel.get_by_text("queued").wait_for()
        visitor.assert_accessible()
        project_id = service.seeded.caller.project_id
        (row,) = commands.list_page(service.seeded.db, project_id=project_id, adapter=adapter_id).items
        assert (row.format, row.hub_repository) == ("adapter", "org/support")


def _make_export(service: Service, folder: Path) -> None:
    """Make the waiting export, as a worker does."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    claim = commands.begin(service.seeded.db, claim_task(service.seeded.db, TaskKind.EXPORT))
    assert claim is not None
    done = commands.ExportResult(
        manifest=service.seeded.store.put_folder(folder, kind="export"),
        verification={"max_abs_diff": 0.5, "tolerance": 2.0},
        cost={"base_seconds": 0.1, "merged_seconds": 0.11, "num_tokens": 128, "same_operations": True},
        hub_url=None,
    )
    commands.finish(service.seeded.db, claim.task, done)


def trained(service: Service) -> str:
    job = seed.submit(service.seeded, "support")
    seed.prepare(service.seeded)
    return seed.succeed(service.seeded, seed.claim(service.seeded)[job.id])


def test_both_models_answer_a_question(fresh: Service, visit: Visit) -> None:
    adapter_id = trained(fresh)
    visitor = visit(fresh)
    visitor.open(f"#/adapters/{adapter_id}")
    panel = visitor.page.get_by_role("region", name="Try it")

    with answering(fresh.seeded.db, fresh.seeded.settings):
        panel.get_by_label("Message").fill("Where is my parcel?")
        panel.get_by_role("button", name="Send").click()
        for model in ("This adapter", "Base model"):
            panel.locator("section", has_text=model).get_by_text("Yes", exact=True).wait_for()

    panel.get_by_role("button", name="Send").wait_for()
    visitor.assert_accessible()


def test_empty_question_is_not_sent(fresh: Service, visit: Visit) -> None:
    adapter_id = trained(fresh)
    visitor = visit(fresh)
    visitor.open(f"#/adapters/{adapter_id}")
    panel = visitor.page.get_by_role("region", name="Try it")

    panel.get_by_role("button", name="Send").click()

    assert panel.get_by_label("Message").evaluate("element => element === document.activeElement")
    assert panel.locator("section").count() == 0

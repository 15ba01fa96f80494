"""The lineage and the serving endpoints on the page of an adapter."""

from __future__ import annotations

from catalog.pepper import Pepper
from catalog.serving import deployments, endpoints
from catalog.serving.endpoints import NewEndpoint
from catalog.storage import files
from catalog.tables.serving import Deployment
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


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
        row.state, row.last_error = "failed", "The server refused it."

    serving.get_by_role("row", name="gpu-1").get_by_text("The server refused it.").wait_for()
    assert "failed" in serving.get_by_role("row", name="gpu-1").inner_text()
    assert "gpu-2" in serving.inner_text()

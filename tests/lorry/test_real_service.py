"""The SDK and the command line against the real service: train, watch, pull, and verify offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorry import Conflict, InvalidRequest, Lorry, NotFound
from tests import tiny_base
from tests.lorry.cli.commands.test_up import up
from tests.lorry.commands import Commands
from tests.services.running import free_port

pytestmark = pytest.mark.usefixtures("service_database")


def test_training_from_a_model_directory_to_a_verified_adapter(tmp_path: Path) -> None:
    base = tiny_base.make(tmp_path / "base")
    train = tiny_base.write_chat(tmp_path / "train.jsonl", 40)
    valid = tiny_base.write_chat(tmp_path / "valid.jsonl", 8, seed=1)
    data_dir = tmp_path / "service" / "data"
    data_dir.parent.mkdir()
    run = Commands(tmp_path, data_dir, 200).run

    port = str(free_port())  # test_up.py may use the default port in another process
    with up(data_dir, "--port", port) as (process, _), Lorry(data_dir=data_dir) as client:
        assert json.loads(run("models", "add", "tiny", base, "--json"))["state"] == "ready"
        flags = "--rank 4 --learning-rate 0.01 --epochs 1 --batch-size 8 --seed 3 --suffix try --watch --json"
        lines = run("jobs", "submit", "tiny", train, "--valid", valid, *flags.split()).splitlines()
        job = client.jobs.get(json.loads(lines[-1])["id"])

        assert (job.status, job.progress.step, job.lora["rank"], job.seed) == ("succeeded", 5, 4, 3)
        assert len(client.jobs.metrics(job.id)) == 5
        assert [attempt.reason for attempt in client.jobs.attempts(job.id)] == ["completed"]
        assert "rows" in run("files", "report", job.training_file, "--model", "tiny")
        assert "succeeded" in run("jobs", "show", job.id)
        assert "Traceback" not in run("jobs", "cancel", job.id, "--yes", code=1)
        assert str(job.fine_tuned_model) in run("adapters", "list")
        assert json.loads(run("adapters", "verify", job.fine_tuned_model, "--json"))["passed"] is True
        folder = tmp_path / run("adapters", "pull", job.fine_tuned_model).strip()
        signed = json.loads(run("adapters", "verify", folder, "--json"))
        assert (signed["passed"], signed["signature"]) == (True, "valid")
        _check_refusals(client, job.training_file)
        process.terminate()
        assert process.wait(60) == 0

    unchecked = run("adapters", "verify", folder, code=3)  # offline, and without the file of the service's keys
    assert "all digests match, but the signature was not checked" in " ".join(unchecked.split())


def _check_refusals(client: Lorry, training_file: str) -> None:
    """Check the service's errors for common mistakes."""
    with pytest.raises(NotFound, match="tiny"):
        client.jobs.create(model="gone", training_file=training_file)
    with pytest.raises(InvalidRequest, match="at least 1") as refused:
        client.jobs.create(model="tiny", training_file=training_file, lora={"rank": 0})
    assert refused.value.remedy
    with pytest.raises(NotFound):
        client.jobs.create(model="tiny", training_file="file-gone")
    client.jobs.create(model="tiny", training_file=training_file, idempotency_key="one")
    with pytest.raises(Conflict):
        client.jobs.create(model="tiny", training_file=training_file, seed=9, idempotency_key="one")

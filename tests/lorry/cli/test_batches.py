"""`lorry batches`, and `client.batches`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import Result

from lorry import Lorry
from tests.lorry.scripted_server import Script

Run = Callable[..., Result]
BATCH: dict[str, Any] = {
    "id": "batch-1",
    "status": "failed",
    "endpoint": "/v1/chat/completions",
    "input_file_id": "file-1",
    "request_counts": {"total": 3, "completed": 1, "failed": 2},
    "errors": {"data": [{"line": 2, "message": "The JSON is invalid.", "code": "invalid_json", "param": None}]},
    "created_at": 1790000000,
}


def test_batch_of_a_local_file_uploads_it(service: Script, run: Run, tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text("{}\n")
    service.on("POST", "/v1/files", {"id": "file-new"})
    service.on("POST", "/v1/batches", BATCH)

    result = run("batches", "create", str(tmp_path / "requests.jsonl"), "--endpoint", "/v1/completions")

    assert result.stderr == "Created batch batch-1. Show it with: lorry batches show batch-1\n"
    assert b'name="purpose"\r\n\r\nbatch\r\n' in service.requests("POST", "/v1/files")[0].body
    sent = json.loads(service.requests("POST", "/v1/batches")[0].body)
    assert sent == {"input_file_id": "file-new", "endpoint": "/v1/completions", "completion_window": "24h"}


def test_batches_are_shown_with_their_invalid_lines(service: Script, run: Run) -> None:
    service.on("GET", "/v1/batches", {"data": [BATCH], "has_more": False})
    service.on("GET", "/v1/batches/batch-1", BATCH)

    listed = run("batches", "list").stdout.splitlines()[1].split()
    shown = [" ".join(line.split()) for line in run("batches", "show", "batch-1").stdout.splitlines()]

    assert listed[:7] == ["batch-1", "failed", "1", "of", "3,", "2", "failed"]
    assert "completed 1 of 3, 2 failed" in shown
    assert "line 2 The JSON is invalid." in shown


def test_batch_is_cancelled(service: Script, run: Run) -> None:
    service.on("POST", "/v1/batches/batch-1/cancel", {**BATCH, "status": "cancelling"})

    assert run("batches", "cancel", "batch-1", "--yes").stderr == "Batch batch-1 is being cancelled.\n"


def test_client_creates_batches_with_metadata(service: Script, client: Lorry) -> None:
    service.on("POST", "/v1/batches", BATCH)

    made = client.batches.create(input_file="file-1", endpoint="/v1/chat/completions", metadata={"run": "a"})

    assert made.request_counts["total"] == 3
    assert json.loads(service.requests("POST", "/v1/batches")[0].body)["metadata"] == {"run": "a"}

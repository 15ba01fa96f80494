"""Uploading, listing and downloading files, and adding base models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lorry import Lorry, LorryError
from lorry.errors import BadDownload, InvalidRequest
from tests.lorry.scripted_server import Reply, Script

CONTENT = b'{"messages": []}\n' * 20_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "Trainingsdaten für März.jsonl"
    path.write_bytes(CONTENT)
    return path


def test_upload_sends_the_whole_file_and_reports_progress(service: Script, client: Lorry, path: Path) -> None:
    service.on("POST", "/v1/files", {"id": "file-1", "bytes": len(CONTENT)})
    progress: list[tuple[int, int]] = []

    file = client.files.upload(path, on_progress=lambda done, total: progress.append((done, total)))

    assert file.id == "file-1"
    assert CONTENT in service.seen[0].body
    assert b'name="purpose"\r\n\r\nfine-tune\r\n' in service.seen[0].body
    assert "März".encode() in service.seen[0].body
    assert progress == sorted(progress)
    assert progress[-1] == (len(CONTENT), len(CONTENT))
    assert len(progress) > 4


def test_retried_upload_starts_at_the_first_byte(service: Script, client: Lorry, path: Path) -> None:
    service.on("POST", "/v1/files", Reply(status=503, body=b""), {"id": "file-1"})

    client.files.upload(path)

    assert [request.body.count(CONTENT) for request in service.seen] == [1, 1]


def test_rejected_line_is_reported_with_its_number(service: Script, client: Lorry, path: Path) -> None:
    error = {"message": "Line 7 is not JSON. Fix it.", "type": "x", "param": "file", "code": "invalid_json_line"}
    service.on("POST", "/v1/files", Reply(status=400, body={"error": error}))

    with pytest.raises(InvalidRequest, match="Line 7") as refused:
        client.files.upload(path)

    assert refused.value.param == "file"


def test_missing_file_raises_and_sends_nothing(service: Script, client: Lorry) -> None:
    with pytest.raises(FileNotFoundError):
        client.files.upload("/nowhere.jsonl")

    assert service.seen == []


def test_adding_a_model_sends_an_absolute_path(
    service: Script, client: Lorry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    service.on("POST", "/v1/models", {"id": "m", "state": "importing"})

    client.models.add("m", "./base")
    client.models.add("m", "some/thing.gguf")
    client.models.add("m", "org/name", revision="abc")
    (tmp_path / "base.whl").touch()
    client.models.add("m", "base.whl")

    unset = {"revision": None, "chat_template": None}
    assert [json.loads(r.body) for r in service.seen] == [
        {"name": "m", "kind": "folder", "source": str(tmp_path / "base")} | unset,
        {
            "name": "m",
            "kind": "gguf",
            "source": str(tmp_path / "some/thing.gguf"),
            "revision": None,
            "chat_template": None,
        },
        {"name": "m", "kind": "hub", "source": "org/name"} | unset | {"revision": "abc"},
        {"name": "m", "kind": "gguf", "source": str(tmp_path / "base.whl")} | unset,
    ]


def test_failed_import_is_raised_with_its_message(service: Script, client: Lorry, slept: list[float]) -> None:
    error = {"code": "no_weights", "message": "No safetensors there.", "remedy": "Name another folder."}
    service.on("GET", "/v1/models/m", {"state": "importing"}, {"state": "failed", "error": error})

    with pytest.raises(LorryError, match="No safetensors") as failed:
        client.models.wait("m")

    assert (failed.value.code, failed.value.remedy) == ("no_weights", "Name another folder.")
    assert slept == [0.5]


def test_duplicate_file_is_reported_and_uploaded(service: Script, path: Path, run: Any) -> None:
    service.on("POST", "/v1/files", {"id": "file-2", "same_content_as": "file-1"}, {"id": "file-3"})

    again, new = run("files", "upload", path), run("files", "upload", path)

    assert (again.stdout, new.stdout) == ("file-2\n", "file-3\n")
    assert again.stderr == f"{path.name} has the same content as file-1; a second copy is stored as file-2.\n"
    assert new.stderr == ""


CURVES = b"step,train_loss\n1,2.5\n"
CURVES_FILE = {"id": "file-r", "filename": "../step_metrics.csv", "digest": hashlib.sha256(CURVES).hexdigest()}


def test_download_uses_the_file_name_and_overwrites_nothing(service: Script, run: Any, tmp_path: Path) -> None:
    service.on("GET", "/v1/files/file-r", CURVES_FILE)
    service.on("GET", "/v1/files/file-r/content", Reply(body=CURVES))

    saved, again, piped = (run("files", "download", "file-r", *rest) for rest in ((), (), ("-",)))

    assert (saved.exit_code, saved.stdout) == (0, "step_metrics.csv\n")
    assert (tmp_path / "step_metrics.csv").read_bytes() == CURVES == piped.stdout_bytes
    assert again.exit_code == 1
    assert "step_metrics.csv" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step_metrics.csv"]


def test_download_that_does_not_match_its_digest_is_not_kept(service: Script, client: Lorry, tmp_path: Path) -> None:
    service.on("GET", "/v1/files/file-r", CURVES_FILE)
    service.on("GET", "/v1/files/file-r/content", Reply(body=CURVES[:-1]))

    with pytest.raises(BadDownload, match="content of file-r does not match the file's SHA-256 digest"):
        client.files.download("file-r", tmp_path / "curves.csv")

    assert list(tmp_path.iterdir()) == []


def test_files_are_listed_by_purpose_and_a_job_names_its_result_file(service: Script, run: Any) -> None:
    service.on("GET", "/v1/files", {"data": [CURVES_FILE], "has_more": False})
    service.on("GET", "/v1/fine_tuning/jobs/j", {"id": "j", "status": "succeeded", "result_files": ["file-r"]})

    listed, shown = run("files", "list", "--purpose", "fine-tune-results"), run("jobs", "show", "j")

    assert "file-r" in listed.stdout
    assert "purpose=fine-tune-results" in service.requests("GET", "/v1/files")[0].path
    assert ["curves", "file-r"] in [line.split() for line in shown.stdout.splitlines()]


@pytest.mark.parametrize(("lifetime", "seconds"), [("90m", b"5400"), ("12h", b"43200"), ("30d", b"2592000")])
def test_upload_sends_the_requested_expiry(
    service: Script, path: Path, run: Any, lifetime: str, seconds: bytes
) -> None:
    service.on("POST", "/v1/files", {"id": "file-1"})

    assert run("files", "upload", path, "--expires-after", lifetime).exit_code == 0

    body = service.seen[0].body
    assert b'name="expires_after[anchor]"\r\n\r\ncreated_at\r\n' in body
    assert b'name="expires_after[seconds]"\r\n\r\n' + seconds + b"\r\n" in body


def test_lifetime_without_a_unit_is_a_usage_error(service: Script, path: Path, run: Any) -> None:
    result = run("files", "upload", path, "--expires-after", "30")

    assert (result.exit_code, service.seen) == (2, [])
    assert "12h" in result.stderr


def test_list_shows_the_expiry_column_if_a_file_expires(service: Script, run: Any) -> None:
    rows = [{"id": "file-1", "expires_at": 1790003600}, {"id": "file-2"}]
    service.on("GET", "/v1/files", {"data": rows, "has_more": False}, {"data": rows[1:], "has_more": False})

    with_one, without = run("files", "list").stdout, run("files", "list").stdout

    assert "EXPIRES" in with_one.splitlines()[0]
    assert "EXPIRES" not in without

"""Exports on the command line and in the client: wait, download, list, cancel, delete, and the printed commands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lorry import BadDownload, Lorry, LorryError
from lorry.resources.exports import AdapterExports
from tests.lorry.adapter_fixture import canonical_sha256, serve, tar
from tests.lorry.scripted_server import Reply, Script

Run = Callable[..., Result]
URL = "/v1/adapters/a/exports"
ID = f"export-{'0' * 24}"
FILES = {"Modelfile": b"FROM ./m.gguf\n", "ft-m-q8_0.gguf": bytes(range(256)) * 100}
DONE = {
    "id": ID,
    "adapter": "a",
    "adapter_name": "ft:m:p:support:1",
    "format": "gguf",
    "quantization": "q8_0",
    "status": "succeeded",
    "bytes": 25_614,
    "created_at": 1_790_000_000,
    "verification": {"max_abs_diff": 0.5, "tolerance": 2.0, "max_abs_diff_to_trained": None, "update_error": 0.398},
    "cost": {"base_seconds": 0.1, "merged_seconds": 0.11, "num_tokens": 128, "same_operations": True},
}


def serve_export(
    service: Script, *, files: dict[str, bytes] = FILES, refusals: Sequence[Any] = (), **fields: Any
) -> None:
    """Serve an export of the adapter `a`. Workers refuse it with these errors at first, then it is running."""
    serve(service, tar())
    done = DONE | fields
    service.on("POST", URL, done | {"status": "queued"})
    service.on("GET", f"{URL}/{ID}", *(done | {"status": "queued", "error": error} for error in refusals))
    service.on("GET", f"{URL}/{ID}", done | {"status": "running"}, done)
    service.on("GET", URL, {"data": [done], "has_more": False})
    rows = [
        {"path": path, "digest": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        for path, content in sorted(files.items())
    ]
    artifact = canonical_sha256({"files": rows, "kind": "export"})
    service.on("GET", f"{URL}/{ID}/files", {"kind": "export", "artifact": artifact, "data": rows})
    for path, content in files.items():
        service.on("GET", f"{URL}/{ID}/files/{path}", Reply(body=content))


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--format", "q8_0"), ["`--format gguf --quantization q8_0`", "merged, gguf, gguf-lora, adapter"]),
        (("--format", "F16"), ["`--format gguf --quantization f16`"]),
        (("--format", "Q4_K_M"), ["a type of a GGUF file, not a format", "llama-quantize", "gguf-lora"]),
        (("--format", "onnx"), ["'onnx' is not a format", "merged, gguf, gguf-lora, adapter"]),
        (("--format", "gguf", "--quantization", "q4_k_m"), ["Lorry writes f16 and q8_0.", "llama-quantize"]),
    ],
)
def test_wrong_format_is_an_error_that_shows_what_to_type(
    service: Script, run: Run, options: tuple[str, ...], parts: list[str]
) -> None:
    result = run("adapters", "export", "a", *options)

    assert result.exit_code == 2
    shown = " ".join(result.stderr.split())
    assert [part for part in parts if part not in shown] == []
    assert service.seen == []


def test_export_is_awaited_downloaded_and_its_use_explained(service: Script, run: Run, tmp_path: Path) -> None:
    serve_export(service)

    result = run("adapters", "export", "a", "--format", "gguf", "--to", "out")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == "out\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    lines = result.stderr.splitlines()
    assert lines[1:] == [
        "Its logits differ from those of the adapted model by at most 0.5. Rounding to the format explains up to 2.",
        "Warning: rounding has removed 40% of what the adapter adds to the weights. The adapter itself loses nothing.",
        "A pass over 128 tokens takes 110 ms with the merged model and 100 ms with the base model, on the worker's "
        "CPU.",
        "Run it with llama.cpp:",
        "  llama-cli --model out/ft-m-q8_0.gguf",
        "  llama-server --model out/ft-m-q8_0.gguf --port 8080",
        "Run it with Ollama:",
        "  ollama create support --file out/Modelfile",
        "  ollama run support",
        "The Modelfile has no TEMPLATE, and Ollama may find none. Check it after `ollama create`:",
        "  ollama show support --template",
    ]
    (request,) = service.requests("POST", URL)
    assert json.loads(request.body) == {"format": "gguf", "quantization": None, "hub_repository": None}


def test_file_of_the_converter_is_described_by_what_was_compared(service: Script, run: Run) -> None:
    compared = "Its 93 tensors are the weights of the merged model."
    serve_export(service, verification={"max_abs_diff": 0.5, "tolerance": 0.5, "explanation": compared})

    result = run("adapters", "export", "a", "--format", "gguf", "--to", "out")

    assert result.stderr.splitlines()[1] == compared
    assert "Its logits" not in result.stderr


def test_modelfile_with_a_template_needs_no_check(service: Script, run: Run) -> None:
    serve_export(service, files={**FILES, "Modelfile": b'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\n'})

    result = run("adapters", "export", "a", "--format", "gguf")

    assert result.stderr.splitlines()[-1] == "  ollama run support"


@pytest.mark.parametrize(
    ("format", "printed"),
    [
        ("merged", "  vllm serve ft-m-p-s-..-x-1-merged --served-model-name support"),
        ("gguf-lora", "  python convert_hf_to_gguf.py FOLDER --outfile BASE.gguf"),
        ("gguf-lora", "  llama-server --model BASE.gguf --lora ft-m-p-s-..-x-1-gguf-lora/ft-m-lora.gguf --port 8080"),
    ],
)
def test_other_formats_print_their_commands(service: Script, run: Run, format: str, printed: str) -> None:  # noqa: A002
    serve_export(service, files={"ft-m-lora.gguf": b"GGUF"}, format=format, quantization=None, cost=None)

    result = run("adapters", "export", "a", "--format", format)

    assert result.exit_code == 0, result.stderr
    assert printed in result.stderr.splitlines()


def test_upload_prints_the_address_and_downloads_nothing(service: Script, run: Run, tmp_path: Path) -> None:
    serve_export(service, hub_repository="org/x", hub_url="https://hub/org/x/commit/1")

    result = run("adapters", "export", "a", "--format", "gguf", "--hub-repository", "org/x")

    assert result.stdout == "https://hub/org/x/commit/1\n"
    assert list(tmp_path.iterdir()) == []
    both = run("adapters", "export", "a", "--format", "gguf", "--hub-repository", "org/x", "--to", "out")
    assert both.exit_code == 2
    assert "--to can't be combined with --hub-repository" in both.stderr


def test_failed_export_shows_its_error_and_remedy(service: Script, run: Run) -> None:
    error = {"code": "hub_rejected", "message": "The worker has no token.", "remedy": "Set HF_TOKEN on the worker."}
    serve_export(service, status="failed", error=error)

    result = run("adapters", "export", "a", "--format", "gguf")

    assert result.exit_code == 1
    assert "Error: The worker has no token." in result.stderr
    assert "Set HF_TOKEN on the worker." in result.stderr


def test_reason_for_waiting_is_shown_once(service: Script, run: Run) -> None:
    error = {"code": "export_failed", "message": "It needs 9 GB, but worker w1 has 1 GB.", "remedy": "Add memory."}
    serve_export(service, refusals=[error, error])

    result = run("adapters", "export", "a", "--format", "gguf")

    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "9 GB" in line]
    assert lines == ["The export waits for a worker. It needs 9 GB, but worker w1 has 1 GB. Add memory."]


def test_interrupted_wait_leaves_the_export_running(service: Script, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_export(service)

    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterExports, "wait", interrupt)

    result = run("adapters", "export", "a", "--format", "gguf")

    assert result.exit_code == 130
    assert "continues. To wait for it again, repeat the command." in result.stderr
    assert f"lorry adapters cancel-export ft:m:p:support:1 {ID}" in result.stderr


def test_download_continues_with_the_files_that_are_missing(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve_export(service)
    broken = f"{URL}/{ID}/files/ft-m-q8_0.gguf"
    service._replies["GET", broken] = [Reply(body=b"cut", cut=True), Reply(body=FILES["ft-m-q8_0.gguf"])]

    with pytest.raises(LorryError):
        client.adapters.exports.pull("a", ID, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    seen: list[tuple[int, int]] = []
    folder = client.adapters.exports.pull("a", ID, tmp_path / "out", on_progress=lambda *bytes_: seen.append(bytes_))

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert len(service.requests("GET", f"{URL}/{ID}/files/Modelfile")) == 1
    total = sum(map(len, FILES.values()))
    assert seen[-1] == (total, total)
    assert client.adapters.exports.pull("a", ID, tmp_path / "out") == folder
    assert len(service.requests("GET", broken)) == 2


def test_changed_file_is_not_saved(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve_export(service)
    service._replies["GET", f"{URL}/{ID}/files/Modelfile"] = [Reply(body=b"FROM ./evil.gg\n")]

    with pytest.raises(BadDownload, match="does not match its SHA-256 digest"):
        client.adapters.exports.pull("a", ID, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_existing_folder_is_not_replaced(service: Script, run: Run, tmp_path: Path) -> None:
    serve_export(service)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()

    result = run("adapters", "export", "a", "--format", "gguf", "--to", "out")

    assert result.exit_code == 1
    assert "out already exists" in result.stderr


def test_exports_are_listed_cancelled_and_deleted_by_a_prefix(service: Script, run: Run) -> None:
    error = {"code": "x", "message": "It failed.", "remedy": "Do this."}
    serve_export(service, status="failed", error=error)
    service.on("POST", f"{URL}/{ID}/cancel", DONE | {"status": "cancelled"})
    service.on("DELETE", f"{URL}/{ID}", {"id": ID, "deleted": True})

    listed = run("adapters", "exports", "a")
    assert ID in run("adapters", "exports", "a", "--quiet").stdout
    assert "gguf" in listed.stdout
    assert f"{ID} failed: It failed. Do this." in listed.stderr
    assert run("adapters", "cancel-export", "a", "export-0").stderr == f"Cancelled export {ID}.\n"
    assert run("adapters", "delete-export", "a", "export-0", "--yes").exit_code == 0
    assert len(service.requests("DELETE", f"{URL}/{ID}")) == 1

"""`lorry adapters lineage`: the lineage record of an adapter, from the service or from a pulled folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.lorry.adapter_fixture import serve, tar
from tests.lorry.scripted_server import Script

DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
SHORT = DIGEST[:12]
RECORD: dict[str, Any] = {
    "format": "lorry.lineage/1",
    "job": "ftjob-1",
    "outputs": {
        "artifact": DIGEST,
        "files": [{"path": "adapter_model.safetensors", "digest": DIGEST, "num_bytes": 19_880_000}],
        "num_bytes": 31_511,
        "num_parameters": 8192,
    },
    "base": {
        "name": "tiny",
        "kind": "folder",
        "source": None,
        "digest": DIGEST,
        "license": "apache-2.0",
        "files": [{"path": "a", "digest": DIGEST, "num_bytes": 380_176}, {"path": "b", "num_bytes": 9_648}],
        "description": {"architecture": "LlamaForCausalLM", "num_parameters": 94_528, "linear_shapes": {"q": [[1], 2]}},
    },
    "data": [
        {
            "role": "training",
            "file": "file-1",
            "digest": DIGEST,
            "num_bytes": 61_283,
            "preparation": {"usable_rows": 400, "supervised_tokens": 3816, "longest_row": 50},
        }
    ],
    "config": {
        "requested": {"lora": {"rank": 4}},
        "resolved": {
            "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
            "n_epochs": 3,
            "max_steps": 40,
            "max_length": 256,
        },
    },
    "attempts": [
        {
            "number": 2,
            "started_at": "2026-11-24T17:53:04.258Z",
            "ended_at": "2026-11-24T17:54:24.785Z",
            "end": "completed",
            "num_packmates": 2,
            "machine": {"device": "cpu", "memory": {"peak_bytes": 480_481_280}},
        }
    ],
    "results": {"evaluation": {"base_loss": 5.9569774, "loss": 2.3612212}, "verification": {"passed": True}},
    "code": {"torch": "2.13.0+cpu\x1b[31m"},
    "graph": {"parents": []},
}
Run = Callable[..., Result]


@pytest.fixture
def run(run: Run) -> Run:
    return partial(run, "adapters")


def printed(result: Result) -> list[str]:
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_record_is_printed_in_sections_with_units_and_short_digests(service: Script, run: Run) -> None:
    service.on("GET", "/v1/adapters/a/lineage", {"adapter_id": "a", "lineage_id": DIGEST, "lineage": RECORD})

    result = run("lineage", "a")
    lines = printed(result)

    titles = ["BASE MODEL", "TRAINING DATA", "CONFIGURATION", "ATTEMPT 2", "RESULTS", "CODE", "FILES"]
    assert [line for line in lines if line.isupper() or line == "ATTEMPT 2"] == titles
    assert lines[:5] == ["adapter a", "job ftjob-1", f"lineage {SHORT}", f"artifact {SHORT}", "parameters 8,192"]
    assert {
        "license apache-2.0",
        "size 390 kB in 2 files",
        "size 61.3 kB",
        "supervised tokens 3,816",
        "longest row 50 tokens",
        "lora.target modules q_proj, v_proj",
        "maximum epochs 3",
        "max length 256 tokens",
        "took 1:21",
        "trained with other jobs 2",
        "peak memory 480 MB",
        "validation loss 5.957 for the base, 2.361 with the adapter",
        "torch 2.13.0+cpu\ufffd[31m",
        f"adapter_model.safetensors {SHORT} 19.9 MB",
    } <= set(lines)
    assert DIGEST not in result.stdout
    assert not any(character in result.stdout for character in "{}'\x1b")


def test_parent_and_children_are_printed(service: Script, run: Run) -> None:
    resolved = {**RECORD["config"]["resolved"], "parent": {"adapter": "adapter-1", "name": "ft:m:p::1"}}
    results = {"evaluation": {"parent_loss": 2.5, "loss": 2.0}}
    record = {**RECORD, "config": {"resolved": resolved}, "results": results, "graph": {"parents": [DIGEST]}}
    answer = {"adapter_id": "a", "lineage_id": DIGEST, "lineage": record, "children": ["ft:m:p::3", "ft:m:p::4"]}
    service.on("GET", "/v1/adapters/a/lineage", answer)

    lines = printed(run("lineage", "a"))

    assert {
        "continues ft:m:p::1",
        "continued by ft:m:p::3, ft:m:p::4",
        "parent.name ft:m:p::1",
        "validation loss 2.5 for the parent, 2 with the adapter",
    } <= set(lines)


def test_json_output_is_the_whole_response(service: Script, run: Run) -> None:
    wire = {"adapter_id": "a", "lineage_id": DIGEST, "lineage": RECORD}
    service.on("GET", "/v1/adapters/a/lineage", wire)

    assert json.loads(run("lineage", "a", "--json").stdout) == wire


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"base": 3, "data": {}, "config": [], "attempts": [None], "results": "x", "outputs": {"files": 1}},
        {
            "base": {"digest": 3, "files": [{}], "description": None},
            "attempts": [{"started_at": 3, "num_packmates": "3"}],
        },
        {"data": [{"role": None, "num_bytes": "x", "preparation": {"rows": []}}], "outputs": {"files": [{}]}},
        {"attempts": [{"started_at": "then", "ended_at": "2026-11-24T17:53:04Z"}], "graph": {"parents": "x"}},
    ],
)
def test_incomplete_or_malformed_record_does_not_fail(service: Script, run: Run, record: dict[str, Any]) -> None:
    service.on("GET", "/v1/adapters/a/lineage", {"lineage_id": "l", "lineage": record})

    assert run("lineage", "a").exit_code == 0


def test_record_of_a_folder_is_read_offline_and_its_files_are_checked(
    service: Script, run: Run, tmp_path: Path
) -> None:
    serve(service, tar())
    folder = tmp_path / run("pull", "a").stdout.strip()
    service.seen.clear()

    whole, machine = run("lineage", folder), run("lineage", folder, "--json")
    (folder / "adapter_config.json").write_text("[]")
    changed = run("lineage", folder)

    assert (whole.exit_code, machine.exit_code, changed.exit_code) == (0, 0, 1)
    assert whole.stderr.splitlines() == [
        f"Read from {folder / 'lineage.json'}, without the service.",
        f"{folder}: all digests match, but the signature was not checked.",
    ]
    assert json.loads(machine.stdout) == json.loads((folder / "lineage.json").read_text())
    assert "adapter_config.json does not match its digest." in changed.stderr
    assert "FAILED: 1 problem" in changed.stderr
    assert service.seen == []


def test_folder_without_a_record_has_a_clear_error(run: Run, tmp_path: Path) -> None:
    result = run("lineage", tmp_path)

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'lineage.json'} can't be read: No such file")


def test_verify_of_a_folder_without_an_adapter_has_its_own_error(run: Run, tmp_path: Path) -> None:
    result = run("verify", tmp_path)

    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: {tmp_path} is not the folder of a pulled adapter: it contains neither manifest.json nor lineage.json.",
        "Use a folder created by `lorry adapters pull`.",
    ]


@pytest.mark.parametrize("command", ["lineage", "verify"])
def test_missing_folder_fails_without_a_request(service: Script, run: Run, command: str) -> None:
    result = run(command, "./gone")

    assert result.exit_code == 2
    assert "folder './gone' does not exist" in result.stderr
    assert service.seen == []

"""`lorry serving`, `lorry adapters deploy` and `undeploy`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lorry.resources.adapters import Adapters
from tests.lorry.scripted_server import Script

Run = Callable[..., Result]
ENDPOINTS = "/v1/serving/endpoints"
ADAPTER = "/v1/adapters/a"
DEPLOYMENTS = "/v1/adapters/ft%3Am%3Ap%3As%3A1/deployments"
VERIFIED: dict[str, Any] = {"passed": True, "max_diff": 0.004, "tolerance": 0.5, "distinguishes": True}
ENDPOINT: dict[str, Any] = {"id": "endpoint-1", "name": "gpu", "base_model": "m", "state": "ready", "max_rank": 16}


def deployment(state: str, **given: Any) -> dict[str, Any]:
    return {"id": "d", "adapter": "ft:m:p:s:1", "endpoint_id": "endpoint-1", "endpoint": "gpu", "state": state, **given}


@pytest.fixture(autouse=True)
def adapter(service: Script) -> None:
    service.on("GET", ADAPTER, {"id": "a", "name": "ft:m:p:s:1"})


def test_add_sends_the_absolute_folder_and_the_key_of_the_file(service: Script, run: Run, tmp_path: Path) -> None:
    service.on("POST", ENDPOINTS, ENDPOINT)
    key = tmp_path / "key"
    key.write_text("secret\n")
    given = ("--base-model", "m", "--url", "http://h:1", "--adapter-folder", str(tmp_path / "x" / ".."))

    result = run("serving", "add", "gpu", *given, "--max-rank", "64", "--api-key-file", str(key))

    assert result.exit_code == 0, result.stderr
    (sent,) = service.requests("POST", ENDPOINTS)
    assert json.loads(sent.body) == {
        "name": "gpu", "base_model": "m", "url": "http://h:1", "adapter_folder": str(tmp_path), "max_rank": 64,
        "api_key": "secret",
    }  # fmt: skip
    assert "lorry serving show gpu" in result.stderr
    assert "secret" not in result.output


@pytest.mark.parametrize("content", ["", None])
def test_unusable_key_file_is_named(service: Script, run: Run, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    given = ("--base-model", "m", "--url", "http://h:1", "--adapter-folder", "/f")

    result = run("serving", "add", "gpu", *given, "--api-key-file", str(path))

    assert (result.exit_code, service.seen) == (2, [])
    assert "--api-key-file" in result.stderr


def test_show_prints_the_state_and_the_last_error(service: Script, run: Run) -> None:
    service.on("GET", f"{ENDPOINTS}/gpu", {**ENDPOINT, "state": "unreachable", "last_error": "It refused."})

    shown = run("serving", "show", "gpu").stdout

    assert "unreachable" in shown
    assert "It refused." in shown


def test_list_prints_the_last_error(service: Script, run: Run) -> None:
    failed = {**ENDPOINT, "state": "failed", "last_error": "vLLM ended 3 times."}
    service.on("GET", ENDPOINTS, {"data": [failed]})

    shown = run("serving", "list").stdout

    assert "failed" in shown
    assert "vLLM ended 3 times." in shown


def test_deploy_waits_until_the_adapter_is_ready(service: Script, run: Run) -> None:
    service.on("POST", f"{ADAPTER}/deployments", deployment("pending"))
    ready = deployment("ready", verification=VERIFIED)
    service.on("GET", DEPLOYMENTS, {"data": [deployment("pending")]}, {"data": [ready]})

    result = run("adapters", "deploy", "a", "--to", "gpu")

    assert result.exit_code == 0, result.stderr
    assert "ft:m:p:s:1 on gpu: ready. passed: log-probabilities differ by 0.004 (allowed: 0.5)" in result.stderr


def test_deploy_prints_the_error_and_exits_with_1(service: Script, run: Run) -> None:
    failed = deployment("failed", last_error="The rank is too high.")
    service.on("POST", f"{ADAPTER}/deployments", deployment("pending"))
    service.on("GET", DEPLOYMENTS, {"data": [failed]})

    result = run("adapters", "deploy", "a", "--to", "gpu")

    assert result.exit_code == 1
    assert "gpu: failed. The rank is too high." in result.stderr


def test_deploy_prints_each_reason_for_waiting_once(service: Script, run: Run) -> None:
    new = deployment("pending")
    gone = deployment("pending", last_error="Endpoint 'gpu' is unreachable.")
    loading = deployment("pending", last_error="No worker is running. Start one: `lorry up` or `lorry worker`.")
    service.on("POST", f"{ADAPTER}/deployments", new)
    states = (new, gone, gone, loading, gone, deployment("ready", last_error=None))
    service.on("GET", DEPLOYMENTS, *({"data": [state]} for state in states))

    result = run("adapters", "deploy", "a", "--to", "gpu")

    assert result.exit_code == 0, result.stderr
    details = "Details: lorry serving show gpu"
    assert [line for line in result.stderr.splitlines() if line.startswith(("The deployment waits", "Details"))] == [
        "The deployment waits. Endpoint 'gpu' is unreachable.",
        details,
        "The deployment waits. No worker is running. Start one: `lorry up` or `lorry worker`.",
        details,
    ]


def test_interrupted_wait_leaves_the_deployment(service: Script, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    service.on("POST", f"{ADAPTER}/deployments", deployment("pending"))

    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Adapters, "wait_deployed", interrupt)

    result = run("adapters", "deploy", "a", "--to", "gpu")

    assert result.exit_code == 130
    assert "The deployment on gpu continues. To wait for it again, repeat the command." in result.stderr
    assert "lorry adapters undeploy ft:m:p:s:1 --from gpu" in result.stderr


def test_adapters_show_lists_the_deployments(service: Script, run: Run) -> None:
    found = deployment("pending", last_error="No worker.")
    service.on("GET", DEPLOYMENTS, {"data": [found]})

    assert "deployed on  gpu: pending. No worker." in run("adapters", "show", "a").stdout


def test_undeploy_chooses_the_only_endpoint(service: Script, run: Run) -> None:
    service.on("GET", f"{ADAPTER}/deployments", {"data": [deployment("ready")]})
    service.on("DELETE", f"{ADAPTER}/deployments/gpu", {"id": "d"})

    result = run("adapters", "undeploy", "a")

    assert result.exit_code == 0, result.stderr
    assert len(service.requests("DELETE", f"{ADAPTER}/deployments/gpu")) == 1


@pytest.mark.parametrize("names", [[], ["gpu", "cpu"]])
def test_undeploy_asks_for_the_endpoint_unless_there_is_one(service: Script, run: Run, names: list[str]) -> None:
    found = [{**deployment("ready"), "endpoint": name} for name in names]
    service.on("GET", f"{ADAPTER}/deployments", {"data": found})

    result = run("adapters", "undeploy", "a")

    assert result.exit_code == 1
    assert ("--from ENDPOINT" if names else "not deployed") in result.stderr

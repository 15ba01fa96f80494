"""`lorry plans create`, `client.plans`, and jobs that are submitted from a plan."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.testing import Result

from lorry import Lorry
from lorry.cli.commands.plans import create as plan_command
from lorry.cli.commands.submit import submit as submit_command
from lorry.errors import WaitTimeout
from lorry.requests import JobFields
from tests.lorry.cli.commands.test_submit import EVERY_OPTION, EXPECTED_REQUEST
from tests.lorry.scripted_server import Reply, Script

PLANS, JOBS = "/v1/plans", "/v1/fine_tuning/jobs"
Run = Callable[..., Result]


def token(text: str, *, trained: bool = False) -> dict[str, Any]:
    return {"text": text, "id": 1, "is_trained": trained}


TOKENS = [token("Q: 1+1? "), token("A: "), token("2", trained=True), token("<end>", trained=True)]
TAIL = [token("tail", trained=True)]
SEGMENTS = [{"start": 0, "tokens": TOKENS}, {"start": 90, "tokens": TAIL}]
ROW = {"part": None, "num_tokens": 91, "whole_tokens": 120, "trained_tokens": 3, "segments": SEGMENTS}
TRAINING = {
    "rows": 12,
    "usable_rows": 10,
    "tokens": 1000,
    "supervised_tokens": 250,
    "longest_row": 120,
    "truncated_rows": 2,
    "empty_rows": 2,
    "duplicate_rows": 0,
    "lines": {"too_long": [3, 4], "empty": [7, 8], "duplicate": []},
    "samples": [{"line": 3, "flaws": ["too_long"], "rows": [ROW]}],
}
ESTIMATE = {"seconds": 100.0, "basis_kind": "measured", "basis": "Measured on worker w1 with this base."}
READY: dict[str, Any] = {
    "id": "plan-1",
    "status": "ready",
    "expires_at": 1790604800,
    "model": "m",
    "training_file": "file-1",
    "configuration": {
        "hyperparameters": {"n_epochs": 3, "batch_size": 4},
        "optimizer": {"learning_rate": 0.0002, "type": "adamw"},
        "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"},
    },
    "data": {"training": TRAINING, "validation": None, "overlap": None},
    "num_steps": 8,
    "trainable_parameters": 4_884_480,
    "adapted_layers": 210,
    "memory": [
        {"kind": "cuda", "total_bytes": 900, "parts": [{"part": "base", "bytes": 900, "description": "the base"}]},
        {"kind": "cpu", "total_bytes": 500, "parts": [{"part": "base", "bytes": 500, "description": "the base"}]},
    ],
    "devices": {
        "smallest_gpu": {"gigabytes": 8, "memory_bytes": 1, "examples": "RTX 4060"},
        "workers_that_fit": [{"worker_id": "w1", "name": "CPU, 2 cores", "kind": "cpu", "memory_bytes": 9}],
        "live_workers": 1,
    },
    "training_time": ESTIMATE,
    "expected_start": {"seconds": None, "basis_kind": "none", "basis": "3 jobs are ahead, and no job has ended yet."},
    "servable": {"vllm": {"verdict": "no", "reasons": ["vLLM does not support DoRA."]}},
    "warnings": [{"code": "few_steps", "message": "The job has 8 optimizer steps.", "remedy": "Use more epochs."}],
}


@pytest.fixture
def plan(submit: Run, service: Script, run: Run) -> Run:
    """Return `plan("m", "train.jsonl", …)`: `lorry plans create` in the folder of `submit`."""
    service.on("POST", PLANS, READY)
    return lambda *arguments: run("plans", "create", *arguments)


def test_plan_accepts_the_options_of_a_job(service: Script, plan: Run) -> None:
    assert plan("m", "train.jsonl", *EVERY_OPTION.split()).exit_code == 0

    sent = json.loads(service.requests("POST", PLANS)[-1].body)
    assert sent == json.loads(json.dumps(EXPECTED_REQUEST))
    plan_options, job_options = (inspect.signature(command).parameters for command in (plan_command, submit_command))
    assert [name for name in job_options if name not in plan_options] == ["plan", "watch"]


def test_training_time_is_shown_as_a_range_with_its_basis(submit: Run, service: Script, run: Run) -> None:
    guess = {"min_seconds": 30.0, "max_seconds": 500.0, "basis_kind": "guess", "basis": "A guess."}
    service.on("POST", PLANS, {**READY, "training_time": {**ESTIMATE, **guess}})

    printed = run("plans", "create", "m", "file-9").stdout

    times = [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith("time ")]
    assert times == ["0:30 to 8:20 (guess)", "0:30 to 8:20. A guess."]


def test_plan_prints_its_estimates_and_the_submit_command(plan: Run) -> None:
    result = plan("m", "file-9")

    assert result.exit_code == 0, result.stderr
    for printed in (
        "4,884,480 in 210 layers",
        "1,000, of which 250 are trained on (25%)",
        "2 rows, truncated (line 3, 4)",
        "2 rows (line 7, 8)",
        "500 B on a CPU",
        "8 GB (RTX 4060)",
        "1:40. Measured on worker w1 with this base.",
        "3 jobs are ahead, and no job has ended yet.",
        "vLLM does not support DoRA.",
        "! The job has 8 optimizer steps. Use more epochs.",
        "91 tokens, cut from 120, 3 trained on",
        "Q: 1+1? A: >2<end>< [... 86 tokens ...] >tail<",
    ):
        assert printed in result.stdout, printed
    assert "on a GPU" not in result.stdout, "the only worker that fits has no GPU"
    assert "lorry jobs submit --plan plan-1" in result.stderr


def test_plan_as_json_equals_the_response(plan: Run) -> None:
    assert json.loads(plan("m", "file-9", "--json").stdout) == READY


def test_files_uploaded_for_a_plan_expire(service: Script, plan: Run) -> None:
    plan("m", "train.jsonl")

    assert b'name="expires_after[seconds]"\r\n\r\n604800' in service.requests("POST", "/v1/files")[0].body


def test_plan_command_waits_and_prints_the_error_of_a_failed_plan(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    failed = {
        "id": "plan-2",
        "status": "failed",
        "error": {"code": "x", "message": "The training file has no trainable tokens."},
    }
    service.on("POST", PLANS, {"id": "plan-2", "status": "computing"})
    service.on("GET", f"{PLANS}/plan-2", {"id": "plan-2", "status": "computing"}, failed)

    result = run("plans", "create", "m", "file-9")

    assert result.exit_code == 1
    assert "The training file has no trainable tokens." in result.stdout


def test_submit_from_a_plan_accepts_no_other_options(service: Script, run: Run) -> None:
    service.on("POST", JOBS, {"id": "ftjob-1", "status": "validating_files"})

    assert run("jobs", "submit", "--plan", "plan-1").stdout == "ftjob-1\n"
    assert json.loads(service.requests("POST", JOBS)[0].body) == {"plan": "plan-1"}
    refused = run("jobs", "submit", "--plan", "plan-1", "--rank", "8")
    assert refused.exit_code == 2
    assert "--plan can't be combined with --rank." in refused.stderr


@pytest.mark.parametrize("command", [("jobs", "submit"), ("plans", "create")])
def test_missing_model_or_file_is_a_usage_error(service: Script, run: Run, command: tuple[str, ...]) -> None:
    missing = run(*command), run(*command, "m")

    assert [result.exit_code for result in missing] == [2, 2]
    assert ["MODEL" in missing[0].stderr, "TRAIN" in missing[1].stderr] == [True, True]
    assert service.seen == []


def test_uploads_of_a_rejected_plan_are_deleted(service: Script, submit: Run, run: Run) -> None:
    error = {"error": {"message": "No model.", "type": "x", "code": "model_not_found", "param": "model"}}
    service.on("POST", PLANS, Reply(status=404, body=error))
    service.on("DELETE", "/v1/files/file-1", {"id": "file-1", "deleted": True})

    assert run("plans", "create", "m", "train.jsonl").exit_code == 1
    assert len(service.requests("DELETE", "/v1/files/file-1")) == 1


def test_client_creates_awaits_lists_and_deletes_plans(service: Script, client: Lorry, slept: list[float]) -> None:
    service.on("POST", PLANS, {"id": "plan-1", "status": "computing"})
    service.on("GET", f"{PLANS}/plan-1", {"id": "plan-1", "status": "computing"}, READY)
    service.on("GET", PLANS, {"data": [READY], "has_more": False})
    service.on("DELETE", f"{PLANS}/plan-1", {"id": "plan-1", "deleted": True})

    made = client.plans.create(model="m", training_file="file-1", lora={"rank": 4}, hyperparameters={"n_epochs": 2})
    planned = client.plans.wait(made.id, poll_seconds=0.5)

    sent = json.loads(service.requests("POST", PLANS)[0].body)
    numbers = {"supervised": {"hyperparameters": {"n_epochs": 2}}}
    assert sent == {
        "model": "m",
        "training_file": "file-1",
        "lora": {"rank": 4},
        "method": {"type": "supervised", **numbers},
    }
    assert (planned.num_steps, planned.training_time.seconds, planned.expected_start.seconds) == (8, 100.0, None)
    assert slept == [0.5]
    assert [one.id for one in client.plans.list()] == ["plan-1"]
    client.plans.delete("plan-1")


def test_client_wait_for_a_plan_times_out(service: Script, client: Lorry) -> None:
    service.on("GET", f"{PLANS}/plan-1", {"id": "plan-1", "status": "computing"})

    with pytest.raises(WaitTimeout):
        client.plans.wait("plan-1", timeout_seconds=0)


def test_client_job_fields_cover_every_request_field() -> None:
    from catalog.spec.job import JobRequest

    fields = set(get_type_hints(JobFields))

    assert fields - {"extra_body"} == set(JobRequest.model_fields) - {"model", "training_file"}


def test_missing_file_is_found_before_any_request(service: Script, run: Run, tmp_path: Path) -> None:
    assert run("plans", "create", "m", tmp_path / "none.jsonl").exit_code == 2
    assert service.seen == []

"""`lorry sweeps`: the request that a command line sends, and the leaderboard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lorry.cli.parsing.sweep_syntax import parameter
from tests.lorry.scripted_server import Reply, Script

Run = Callable[..., Result]
SWEEP = {
    "id": "sweep-1",
    "status": "running",
    "model": "m",
    "search": {"type": "asha", "seed": 3, "min_steps": 5, "reduction_factor": 3},
    "objective": {"metric": "valid_loss", "goal": "minimize"},
    "num_trials": 2,
    "counts": {"running": 1, "cancelled": 1},
}
TRIALS = [
    {"id": "ftjob-a", "number": 1, "parameters": {"lora.rank": 8}, "status": "running", "value": 1.25, "rung": 0},
    {"id": "ftjob-b", "number": 0, "parameters": {"lora.rank": 4}, "status": "cancelled", "reason": "pruned"},
]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("lora.rank=4,8,16", {"values": [4, 8, 16]}),
        ("optimizer.learning_rate=1e-5..1e-3:log", {"min": 1e-5, "max": 1e-3, "scale": "log"}),
        ("lora.dropout=0..0.2:5", {"min": 0, "max": 0.2, "points": 5}),
        ("schedule.type=cosine,wsd", {"values": ["cosine", "wsd"]}),
        ("lora.use_dora=true,false", {"values": [True, False]}),
        ('lora.target_modules=[["q_proj"], "all-linear"]', {"values": [["q_proj"], "all-linear"]}),
    ],
)
def test_over_option_parses_values_and_ranges(typed: str, expected: dict[str, Any]) -> None:
    assert parameter(typed) == (typed.partition("=")[0], expected)


@pytest.fixture
def data(service: Script, tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text("{}\n")
    service.on("GET", "/v1/models/m", {"id": "m", "state": "ready"})
    service.on("POST", "/v1/files", {"id": "file-1"}, {"id": "file-2"})


LINE = "sweeps run m train.jsonl --valid valid.jsonl --over lora.rank=4,8 --over optimizer.learning_rate=1e-5..1e-3:log"


def test_run_sends_one_request(service: Script, run: Run, data: None) -> None:
    service.on("POST", "/v1/sweeps", SWEEP)

    printed = run(
        *LINE.split(), "--tpe", "--asha", "--trials", 20, "--epochs", 2, "--set", "lora.alpha=32", "--keep-best"
    )

    assert printed.exit_code == 0
    assert printed.stdout == "sweep-1\n"
    assert "lorry sweeps show sweep-1" in printed.stderr
    (sent,) = service.requests("POST", "/v1/sweeps")
    assert json.loads(sent.body) == {
        "model": "m",
        "training_file": "file-1",
        "validation_file": "file-2",
        "parameters": {
            "lora.rank": {"values": [4, 8]},
            "optimizer.learning_rate": {"min": 1e-5, "max": 1e-3, "scale": "log"},
        },
        "search": {"type": "tpe", "pruner": "asha", "trials": 20},
        "method": {"supervised": {"hyperparameters": {"n_epochs": 2}}},
        "lora": {"alpha": 32},
        "keep_adapters": "best",
    }
    assert sent.headers["idempotency-key"]


def test_rejected_sweep_names_the_option_and_deletes_its_uploads(service: Script, run: Run, data: None) -> None:
    error = {"message": "Invalid value in the trial with lora.rank = 8.", "type": "x", "param": "parameters.lora.rank"}
    service.on("POST", "/v1/sweeps", Reply(status=400, body={"error": {**error, "code": "invalid_value"}}))
    service.on("DELETE", "/v1/files/file-1", {"deleted": True})
    service.on("DELETE", "/v1/files/file-2", {"deleted": True})

    printed = run(*LINE.split(), "--random", "--trials", 3)

    assert printed.exit_code == 1
    assert "(at --over lora.rank)" in printed.stderr
    assert len(service.requests("DELETE", "/v1/files/file-1")) == 1


@pytest.mark.parametrize(
    ("over", "remedy"),
    [
        ("lr=1e-4,1e-3", "--over optimizer.learning_rate=…"),
        ("rank=4,8", "--over lora.rank=…"),
        ("batch-size=4,8", "--over method.dpo.hyperparameters.batch_size=…"),
        ("optimizer=adamw,sgd", "--over optimizer.type=…"),
        ("optimizer.learning_rate=1e-5..1e-3:log", "--over optimizer.learning_rate=1e-05..0.001:log:8"),
    ],
)
def test_invalid_search_space_is_rejected_before_the_upload(
    service: Script, run: Run, data: None, over: str, remedy: str
) -> None:
    printed = run("sweeps", "run", "m", "train.jsonl", "--method", "dpo", "--over", over)

    assert printed.exit_code == 2
    assert remedy in " ".join(printed.stderr.replace("│", " ").split())
    assert service.seen == []


def test_over_accepts_groups_and_fields_named_like_options(service: Script, run: Run, data: None) -> None:
    service.on("POST", "/v1/sweeps", SWEEP)

    printed = run(
        "sweeps", "run", "m", "train.jsonl", "--over", 'optimizer=[{"type": "sgd"}]', "--over", "max_steps=4,8"
    )

    assert printed.exit_code == 0


@pytest.mark.parametrize(
    "flags",
    [
        "--asha",
        "--random --tpe --trials 2",
        "--trials 3",
        "--tpe --trials 3 --min-steps 4",
        "--random --trials 3 --min-steps 4",
        "--over lora.rank=2",
    ],
)
def test_conflicting_options_are_a_usage_error(service: Script, run: Run, data: None, flags: str) -> None:
    printed = run(*LINE.split(), *flags.split())

    assert printed.exit_code == 2
    assert service.requests("POST", "/v1/files") == []


def test_show_prints_the_leaderboard(service: Script, run: Run) -> None:
    service.on("GET", "/v1/sweeps/sweep-1", SWEEP)
    service.on("GET", "/v1/sweeps/sweep-1/trials", {"data": TRIALS, "has_more": False})

    printed = run("sweeps", "show", "sweep-1")

    lines = printed.stdout.splitlines()
    assert "1 of 2 finished (1 cancelled, 1 running)" in printed.stdout
    assert lines[-3].split() == ["TRIAL", "rank", "VALID_LOSS", "STEP", "STATUS", "RUNG", "JOB"]
    assert lines[-2].split() == ["1", "8", "1.25", "-", "running", "0", "ftjob-a"]
    assert lines[-1].split() == ["0", "4", "-", "-", "pruned", "-", "ftjob-b"]


def test_best_trial_is_labeled_as_best_finished(service: Script, run: Run) -> None:
    verifying = {**TRIALS[0], "phase": "verifying", "progress": {"step": 9, "num_steps": 9}}
    service.on("GET", "/v1/sweeps/sweep-1", {**SWEEP, "best_trial": {**TRIALS[1], "value": 1.75}})
    service.on("GET", "/v1/sweeps/sweep-1/trials", {"data": [verifying], "has_more": False})

    printed = run("sweeps", "show", "sweep-1")

    assert "best finished" in printed.stdout
    assert printed.stdout.splitlines()[-1].split() == ["1", "8", "1.25", "9/9", "verifying", "0", "ftjob-a"]


def test_watch_ends_with_the_best_adapter(service: Script, run: Run) -> None:
    done = {**SWEEP, "status": "succeeded", "fine_tuned_model": "ft:m:p::a", "best_trial": TRIALS[0]}
    service.on("GET", "/v1/sweeps/sweep-1", done)
    service.on("GET", "/v1/sweeps/sweep-1/trials", {"data": TRIALS, "has_more": False})

    printed = run("sweeps", "watch", "sweep-1")

    assert printed.exit_code == 0
    assert "trial 1, 1.25 with lora.rank=8" in printed.stderr
    assert "lorry adapters pull sweep-1" in printed.stderr


def test_watch_of_a_sweep_without_an_adapter_exits_with_1(service: Script, run: Run) -> None:
    service.on("GET", "/v1/sweeps/sweep-1", {**SWEEP, "status": "failed"})
    service.on("GET", "/v1/sweeps/sweep-1/trials", {"data": [], "has_more": False})

    assert run("sweeps", "watch", "sweep-1").exit_code == 1


def test_sweeps_are_listed_and_cancelled(service: Script, run: Run) -> None:
    service.on("GET", "/v1/sweeps", {"data": [{**SWEEP, "best_trial": TRIALS[0]}], "has_more": False})
    service.on("POST", "/v1/sweeps/sweep-1/cancel", {**SWEEP, "cancel_requested": True})

    listed, cancelled = run("sweeps", "list"), run("sweeps", "cancel", "sweep-1", "--yes")

    assert listed.stdout.splitlines()[1].split()[:6] == ["sweep-1", "running", "asha", "m", "1/2", "1.25"]
    assert cancelled.stderr == "Sweep sweep-1 is being cancelled.\n"

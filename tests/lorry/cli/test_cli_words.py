"""Output about jobs, workers, models, files and adapters, confirmation of deletions, and command aliases."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from catalog.datasets.validator import inspect
from catalog.errors import InvalidRequest
from lorry import Job
from lorry.cli.main import app
from lorry.cli.render import output, progress_bars
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
JOB: dict[str, Any] = {
    "id": "j",
    "status": "running",
    "model": "m",
    "progress": {"step": 3, "num_steps": 9, "loss": 1.5, "tokens_per_second": 480.2, "seconds_left": 61},
    "created_at": 1790000000,
}
PAUSED = {**JOB, "status": "paused"}
Run = Callable[..., Result]


def test_worker_list_needs_one_request(service: Script, run: Run) -> None:
    rows = [{"id": "one", "state": "busy"}, {"id": "two", "state": "idle", "trainer_id": "t-two"}]
    service.on("GET", "/v1/workers", {"data": rows, "has_more": False})

    _, *lines = run("workers", "list").stdout.splitlines()

    assert [line.split()[:2] for line in lines] == [["one", "busy"], ["two", "idle"]]
    assert len(service.seen) == 1


def test_paused_job_shows_the_resume_command_and_no_time_left(service: Script, run: Run) -> None:
    service.on("GET", f"{JOBS}/j", PAUSED)
    service.on("GET", JOBS, {"data": [PAUSED], "has_more": False})

    shown, listed = run("jobs", "show", "j").stdout, run("jobs", "list")

    assert "paused. Resume it with: lorry jobs resume j\n" in shown
    assert "time left" not in shown
    assert listed.stderr == "Resume a paused job with: lorry jobs resume ID\n"


def test_watch_prints_the_pause_hint_once(service: Script, run: Run) -> None:
    jobs = (PAUSED, {**PAUSED, "progress": {**JOB["progress"], "step": 4}}, {**JOB, "status": "cancelled"})
    events = [f"event: job\nid: {i}\ndata: {json.dumps(job)}\n\n" for i, job in enumerate(jobs)]
    service.on("GET", f"{JOBS}/j/stream", Reply(body="".join(events).encode()))

    assert run("jobs", "watch", "j").stderr.splitlines() == [
        "j  paused  step 3/9  loss 1.500",
        "Job j is paused. Resume it with: lorry jobs resume j",
        "j  paused  step 4/9  loss 1.500",
        "Job j cancelled.",
    ]


def test_show_prints_the_configuration_and_why_the_job_waits(service: Script, run: Run) -> None:
    configured = {
        "suffix": "mine",
        "schedule": {"type": "cosine", "warmup_steps": 5},
        "precision": "bf16",
        "max_length": 2048,
        "max_steps": 40,
        "validation_file": "file-v",
        "evaluation": {"every_steps": None},
        "checkpoint_every_steps": 50,
        "attempt": 2,
        "hyperparameters": {"n_epochs": 3},
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 3, "beta": 0.25, "label_smoothing": 0.5}}},
    }
    service.on("GET", f"{JOBS}/j", {**JOB, **configured, "status": "queued"})
    service.on("GET", f"{JOBS}/j/why", {"explanation": "No worker is available.", "state": "queued", "live_workers": 0})

    lines = [line.split(maxsplit=1) for line in run("jobs", "show", "j").stdout.splitlines()]

    printed = [" ".join(" ".join(line).split()) for line in lines]
    assert {
        "why No worker is available.",
        "suffix mine",
        "schedule.type cosine",
        "schedule.warmup_steps 5",
        "precision bf16",
        "max length 2048 tokens",
        "max steps 40",
        "evaluation every tenth of the job",
        "checkpoint every 50 steps",
        "attempt 2",
        "method dpo",
        "beta 0.25",
        "label smoothing 0.5",
    } <= set(printed)
    assert [line for line in printed if "epochs" in line] == ["epochs 3"]
    assert not any("live_workers" in line for line in printed)


def test_why_prints_the_explanation_or_all_inputs_as_json(service: Script, run: Run) -> None:
    printed = {"explanation": "No worker is available.", "state": "queued", "live_workers": 0}
    service.on("GET", f"{JOBS}/j/why", printed)

    assert run("jobs", "why", "j").stdout == "No worker is available.\n"
    assert json.loads(run("jobs", "why", "j", "--json").stdout) == printed


def test_list_and_show_include_validation_loss_and_running_time(service: Script, run: Run) -> None:
    progress = {**JOB["progress"], "valid_loss": 1.75, "best_valid_loss": 1.25}
    job = {**JOB, "status": "succeeded", "finished_at": 1790009000, "seconds_running": 3723.4, "progress": progress}
    service.on("GET", JOBS, {"data": [job, {**JOB, "seconds_running": 0.0}], "has_more": False})
    service.on("GET", f"{JOBS}/j", job)

    head, first, second = run("jobs", "list").stdout.splitlines()
    shown = [" ".join(line.split()) for line in run("jobs", "show", "j").stdout.splitlines()]

    assert head.split() == ["ID", "STATUS", "MODEL", "STEP", "LOSS", "VALID", "TOOK", "CREATED"]
    assert first.split()[4:7] == ["1.5", "1.75", "1:02:03"]
    assert second.split()[4:7] == ["1.5", "-", "-"]
    assert {"validation loss 1.75", "best validation loss 1.25", "took 1:02:03"} <= set(shown)


def test_validation_loss_is_that_of_the_kept_step(service: Script, run: Run) -> None:
    progress = {**JOB["progress"], "valid_loss": 2.5, "best_valid_loss": 1.25, "step": 9}
    kept = {**progress, "kept_step": 6, "kept_valid_loss": 1.25}
    service.on("GET", JOBS, {"data": [{**JOB, "status": "succeeded", "progress": kept}], "has_more": False})
    service.on("GET", f"{JOBS}/j", {**JOB, "status": "succeeded", "progress": kept})

    _, listed = run("jobs", "list").stdout.splitlines()
    shown = [" ".join(line.split()) for line in run("jobs", "show", "j").stdout.splitlines()]

    assert listed.split()[5] == "1.25"
    assert "validation loss 1.25 at step 6 (used for the adapter)" in shown
    assert "validation loss of the last step 2.5" in shown
    assert not any(line.startswith("best validation loss") for line in shown)


def test_show_prints_the_method_and_the_sample_prompts(service: Script, run: Run) -> None:
    samples = {"prompts": ["How cold?", "How warm?"], "max_tokens": 32}
    numbers = {"n_epochs": 3, "beta": 0.1}
    configured = {
        "validation_file": "file-v",
        "evaluation": {"every_steps": 5, "keep": "best", "samples": samples},
        "hyperparameters": {"n_epochs": 3},
        "method": {"type": "dpo", "dpo": {"hyperparameters": numbers}},
    }
    service.on("GET", f"{JOBS}/j", {**JOB, **configured})

    shown = [" ".join(line.split()) for line in run("jobs", "show", "j").stdout.splitlines()]

    at = shown.index("sample prompts How cold?")
    assert shown[at + 1 : at + 3] == ["How warm?", "sample max tokens 32"]
    assert {"method dpo", "beta 0.1"} <= set(shown)


def test_list_has_a_suffix_column_if_a_job_has_a_suffix(service: Script, run: Run) -> None:
    service.on("GET", JOBS, {"data": [{**JOB, "suffix": "support"}, JOB], "has_more": False})

    lines = [line.split()[:4] for line in run("jobs", "list").stdout.splitlines()]

    assert lines == [["ID", "STATUS", "SUFFIX", "MODEL"], ["j", "running", "support", "m"], ["j", "running", "-", "m"]]


@pytest.mark.parametrize(
    ("max_steps", "num_steps", "usable_rows", "printed"),
    [
        (None, 300, None, "3"),
        (40, 30, None, "3"),
        (40, 40, 400, "0.8 of 3 (limited by max steps)"),
        (150, 150, 400, "3"),
        (40, 40, None, "3 or fewer (limited by max steps)"),
        (40, 0, None, "3 or fewer (limited by max steps)"),
    ],
)
def test_shown_epochs_account_for_max_steps(
    service: Script, run: Run, max_steps: int | None, num_steps: int, usable_rows: int | None, printed: str
) -> None:
    numbers = {"n_epochs": 3, "batch_size": 8}
    progress = {"step": 0, "num_steps": num_steps}
    service.on("GET", f"{JOBS}/j", {**JOB, "max_steps": max_steps, "hyperparameters": numbers, "progress": progress})
    service.on("GET", f"{JOBS}/j/data_report", {"training": usable_rows and {"usable_rows": usable_rows}})

    lines = run("jobs", "show", "j").stdout.splitlines()

    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("epochs")] == [printed]


def test_watch_line_includes_the_validation_loss() -> None:
    job = {**JOB, "status": "succeeded", "progress": {**JOB["progress"], "valid_loss": 1.75}}

    assert progress_bars.facts(Job.of(job)) == "succeeded  step 3/9  loss 1.500  valid 1.750"


@pytest.mark.parametrize(
    ("max_width", "printed"),
    [
        (67, "running  step 3/9  loss 1.500  valid 1.750  480 tokens/s  1:01 left"),
        (66, "running  step 3/9  loss 1.500  valid 1.750  1:01 left"),
        (47, "running  step 3/9  loss 1.500  valid 1.750"),
        (30, "running  step 3/9  loss 1.500"),
        (5, "running  step 3/9"),
    ],
)
def test_progress_text_is_shortened_to_the_width(max_width: int, printed: str) -> None:
    job = Job.of({**JOB, "progress": {**JOB["progress"], "valid_loss": 1.75}})

    assert progress_bars.facts(job, max_width=max_width) == printed


def test_model_list_shortens_an_import_error_and_show_prints_all_of_it(service: Script, run: Run) -> None:
    message = f"There is no {'such ' * 40}repository.\nTraceback"
    model = {"id": "m", "state": "failed", "error": {"code": "c", "message": message, "remedy": "Check the name."}}
    service.on("GET", "/v1/models", {"data": [model], "has_more": False})
    service.on("GET", "/v1/models/m", model)

    listed, shown = run("models", "list").stderr.splitlines(), run("models", "show", "m").stdout

    assert listed[0].startswith("m failed: There is no such such")
    assert listed[0].endswith("such …")
    assert listed[1:] == ["Show the whole error and its fix with: lorry models show m"]
    assert "repository.\n       Traceback\nfix    Check the name.\n" in shown
    assert json.loads(run("models", "show", "m", "--json").stdout) == model


def test_models_show_prints_the_license(service: Script, run: Run) -> None:
    service.on("GET", "/v1/models/m", {"id": "m", "state": "ready", "description": {"license": "apache-2.0"}})

    assert ["license", "apache-2.0"] in [line.split() for line in run("models", "show", "m").stdout.splitlines()]


def test_report_of_an_unprepared_file_suggests_a_command(service: Script, run: Run) -> None:
    service.on("GET", "/v1/files/file-1/report", {"file": "file-1", "model": "m", "report": None})

    plain, as_json = (run("files", "report", "file-1", "--model", "m", *more) for more in ((), ("--json",)))

    assert plain.stdout == ""
    assert "lorry jobs submit m file-1" in plain.stderr
    assert json.loads(as_json.stdout)["report"] is None


@pytest.mark.parametrize(
    ("lines", "printed"),
    [
        (["{]"], ["Error: Line 1: "]),
        (["{]", '{"messages": 3}'], ["Error:", "  Line 1: ", "  Line 2: ", ""]),
        (["{]"] * 9, ["Error:", *(f"  Line {n}: " for n in range(1, 6)), "  Reading stopped at the 5th", ""]),
    ],
)
def test_upload_error_prints_each_invalid_line_separately(
    service: Script, run: Run, tmp_path: Path, lines: list[str], printed: list[str]
) -> None:
    content = "\n".join(lines).encode()
    with pytest.raises(InvalidRequest) as refused:
        inspect(io.BytesIO(content), max_line_bytes=100, max_rows=100)
    error = {"message": refused.value.sentence(), "code": refused.value.code, "param": "file"}
    service.on("POST", "/v1/files", Reply(status=400, body={"error": {**error, "remedy": refused.value.remedy}}))
    (tmp_path / "chats.jsonl").write_bytes(content)

    expected = run("files", "upload", "chats.jsonl").stderr.splitlines()

    assert len(expected) == len(printed)
    assert len(expected) == 1 or expected[-1] == refused.value.remedy
    assert all(line.startswith(start) for line, start in zip(expected, printed, strict=True))


@pytest.mark.parametrize("command", ["files delete --yes", "adapters delete -y", "models delete --yes"])
def test_delete_confirms_or_prints_the_service_error(service: Script, run: Run, command: str) -> None:
    refused = {"error": {"message": "A job uses it.", "type": "x", "param": None, "code": "c"}}
    group, kind = command.split(maxsplit=1)[0], {"files": "file"}.get(command.split(maxsplit=1)[0], "adapter")
    service.on("GET", "/v1/adapters/ft%3Ax", {"name": "ft:x"})
    service.on("GET", "/v1/adapters/used", {"name": "used"})
    service.on("DELETE", f"/v1/{group}/ft%3Ax", {"id": "ft:x", "deleted": True})
    service.on("DELETE", f"/v1/{group}/used", Reply(status=409, body=refused))

    done, as_json, kept = (run(*command.split(), *more) for more in (("ft:x",), ("ft:x", "--json"), ("used",)))

    assert (done.exit_code, done.stderr) == (0, f"Deleted {kind} ft:x.\n")
    assert json.loads(as_json.stdout) == {"id": "ft:x", "deleted": True}
    assert (kept.exit_code, kept.stderr) == (1, "Error: A job uses it.\n")


@pytest.mark.usefixtures("run")
def test_ctrl_c_at_the_prompt_exits_with_130(service: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def readline(self) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(output, "is_interactive", lambda: True)
    monkeypatch.setattr(output, "sys", SimpleNamespace(stdin=Interrupted(), stderr=sys.stderr))

    result = CliRunner().invoke(app, ["models", "delete", "tiny"])

    assert result.exit_code == 130
    assert service.seen == []


def test_models_delete_prints_that_adapters_are_kept(service: Script, run: Run) -> None:
    service.on("DELETE", "/v1/models/tiny", {})

    assert run("models", "delete", "tiny", "-y").stderr == "Deleted base model tiny. Adapters trained on it are kept.\n"


def test_piped_pairs_are_neither_padded_nor_wrapped(service: Script, run: Run) -> None:
    service.on("GET", "/v1/models/m", {"id": "m", "source": "s" * 300, "error": {"message": "a\nb"}})

    assert run("models", "show", "m").stdout == f"name    m\nerror   a\n        b\nsource  {'s' * 300}\n"


def test_adapters_show_prints_units_and_the_loss_of_the_base(service: Script, run: Run) -> None:
    wire = {
        "name": "ft:x",
        "bytes": 9_776_128,
        "num_parameters": 4_884_480,
        "evaluation": {"base_loss": 2.91, "loss": 1.87},
        "verification": {"passed": True, "max_abs_diff": 0.0, "tolerance": 0.01, "explanation": "Three roundings."},
    }
    service.on("GET", "/v1/adapters/ft%3Ax", wire)
    service.on("GET", "/v1/adapters/ft%3Ax/deployments", {"data": []})

    lines = [" ".join(line.split()) for line in run("adapters", "show", "ft:x").stdout.splitlines()]

    assert lines == [
        "name ft:x",
        "parameters 4,884,480",
        "size 9.78 MB",
        "validation loss 2.91 for the base, 1.87 with the adapter",
        "verified with PEFT yes",
        "largest logit difference 0",
        "allowed 0.01",
        "why Three roundings.",
    ]


@pytest.mark.parametrize(
    ("typed", "current"),
    [("keys delete", "revoke"), ("keys rm", "revoke"), ("jobs delete", "cancel"), ("projects remove", "archive")],
)
def test_verb_with_a_different_effect_is_only_suggested(service: Script, run: Run, typed: str, current: str) -> None:
    result = run(*typed.split(), "x")

    assert result.exit_code == 2
    assert f"No such command '{typed.split()[1]}'. Did you mean '{current}'?" in result.stderr
    assert service.seen == []


@pytest.mark.parametrize(
    ("typed", "current"),
    [
        ("webhooks add", "create"),
        ("webhooks change", "update"),
        ("webhooks remove", "delete"),
        ("models create", "add"),
        ("files rm", "delete"),
        ("keys add", "create"),
        ("jobs get", "show"),
        ("jobs ls", "list"),
    ],
)
def test_synonyms_run_the_command_of_the_group(run: Run, typed: str, current: str) -> None:
    group, verb = typed.split()
    old, new = run(group, verb, "--help").stdout, run(group, current, "--help").stdout

    assert old.partition("\n\n")[2].partition("  Examples:")[0].strip() in new
    assert f"{verb} " not in run(group, "--help").stdout.partition("Commands:")[2].replace(f" {current} ", "")

"""The command line: output on stdout and stderr, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lorry import __version__, connection
from tests.lorry.adapter_fixture import serve, tar
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
Run = Callable[..., Result]
JOB = {
    "id": "ftjob-1",
    "status": "running",
    "model": "m",
    "progress": {"step": 3, "num_steps": 9, "loss": 1.5, "tokens_per_second": 480.2, "seconds_left": 61},
    "created_at": 1790000000,
    "lora": {"rank": 16},
}


def error_reply(message: str, status: int = 400) -> Reply:
    return Reply(status=status, body={"error": {"message": message, "type": "x", "param": "model", "code": "c"}})


@pytest.mark.parametrize(
    ("arguments", "path", "reply"),
    [
        (("jobs", "list"), JOBS, {"data": [JOB], "has_more": False}),
        (("files", "list"), "/v1/files", {"data": [{"id": "file-1", "bytes": 5}], "has_more": False}),
        (("models", "list"), "/v1/models", {"data": [{"id": "m", "state": "ready"}], "has_more": False}),
        (("adapters", "list"), "/v1/adapters", {"data": [{"id": "a", "name": "n", "bytes": 1}], "has_more": False}),
        (("workers", "list"), "/v1/workers", {"data": [{"id": "w", "devices": [{"name": "CPU"}]}], "has_more": False}),
    ],
)
def test_list_prints_a_table_or_the_api_objects_as_json(
    service: Script, run: Run, arguments: tuple[str, ...], path: str, reply: dict[str, Any]
) -> None:
    service.on("GET", path, reply)

    plain, structured = run(*arguments), run(*arguments, "--json")

    assert plain.exit_code == structured.exit_code == 0
    assert reply["data"][0]["id" if "adapters" not in arguments else "name"] in plain.stdout
    assert json.loads(structured.stdout) == reply["data"]


def test_empty_list_prints_the_next_command_on_stderr(service: Script, run: Run) -> None:
    service.on("GET", JOBS, {"data": [], "has_more": False})

    result = run("jobs", "list")

    assert result.stdout == ""
    assert "lorry jobs submit" in result.stderr


@pytest.mark.parametrize(("doc_url", "more"), [("", ""), ("http://x/#a", "More: http://x/#a\n")])
def test_service_error_prints_its_message_and_doc_url_on_stderr_and_exits_with_1(
    service: Script, run: Run, doc_url: str, more: str
) -> None:
    error = {"message": "No job. Check the ID.", "remedy": "Check the ID.", "code": "job_not_found", "doc_url": doc_url}
    service.on("GET", f"{JOBS}/x", Reply(status=404, body={"error": error}))

    result = run("jobs", "show", "x", "--json")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: No job. Check the ID.\n{more}"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "jobs",
        "nonsense",
        "jobs submit m",
        "jobs submit m gone.jsonl",
        "jobs submit m file-1 --rank many",
        "jobs list -x",
        "files upload gone.jsonl",
        "up --port 0",
    ],
)
def test_usage_error_exits_with_2_and_sends_no_request(service: Script, run: Run, arguments: str) -> None:
    result = run(*arguments.split())

    assert result.exit_code == 2
    assert service.seen == []


def test_missing_service_suggests_lorry_up(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORRY_URL")
    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))

    result = run("jobs", "list")

    assert result.exit_code == 1
    assert f"`lorry up --data-dir {tmp_path}`" in result.stderr
    assert "Traceback" not in result.stderr


def test_unreachable_service_error_names_the_source_of_its_address(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lorry.transport.retries.RetryPolicy.delay", lambda *_: 0)
    monkeypatch.setenv("LORRY_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))
    path = connection.write(tmp_path, connection.Connection(url="http://127.0.0.1:8472", api_key="k"))

    message = run("jobs", "list").stderr

    assert "Could not connect to the service at http://127.0.0.1:1" in message
    assert f"variable LORRY_URL; without it, the address would be http://127.0.0.1:8472, from {path}" in message


def test_submit_uploads_paths_and_sends_only_the_given_options(service: Script, run: Run, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    service.on("GET", "/v1/models/m", {"id": "m"})
    service.on("POST", "/v1/files", {"id": "file-new"})
    service.on("POST", JOBS, JOB)
    flags = "--rank 4 --learning-rate 0.001 --epochs 2 --batch-size 8 --seed 7 --suffix s --target q_proj --target v"

    result = run("jobs", "submit", "m", "train.jsonl", "--valid", "file-old", *flags.split())

    assert result.stdout == "ftjob-1\n"
    assert json.loads(service.requests("POST", JOBS)[0].body) == {
        "model": "m",
        "training_file": "file-new",
        "validation_file": "file-old",
        "suffix": "s",
        "seed": 7,
        "lora": {"rank": 4, "target_modules": ["q_proj", "v"]},
        "optimizer": {"learning_rate": 0.001},
        "method": {"supervised": {"hyperparameters": {"batch_size": 8, "n_epochs": 2}}},
    }


def test_submit_leaves_range_checks_to_the_service(service: Script, run: Run) -> None:
    service.on("POST", JOBS, error_reply("'lora.rank' must be at least 1; it was 0."))

    result = run("jobs", "submit", "m", "file-1", "--rank", "0")

    assert result.exit_code == 1
    assert "at least 1" in result.stderr


def stream_of(*statuses: str) -> Reply:
    events = [f"event: job\nid: {i}\ndata: {json.dumps({**JOB, 'status': s})}\n\n" for i, s in enumerate(statuses)]
    return Reply(body="".join(events).encode(), headers={"content-type": "text/event-stream"})


def test_watch_prints_each_change_once_and_the_outcome(service: Script, run: Run) -> None:
    service.on("GET", f"{JOBS}/ftjob-1/stream", stream_of("queued", "running", "running", "succeeded"))

    result = run("jobs", "watch", "ftjob-1")

    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "ftjob-1  queued  step 3/9  loss 1.500  480 tokens/s  1:01 left",
        "ftjob-1  running  step 3/9  loss 1.500  480 tokens/s  1:01 left",
        "Job ftjob-1 succeeded: None",
    ]


@pytest.mark.parametrize(("quiet_seconds", "num_lines"), [(3600.0, 11), (0.0, 41)])
def test_watch_without_a_terminal_prints_a_line_at_each_tenth_or_after_a_minute(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch, quiet_seconds: float, num_lines: int
) -> None:
    from lorry.cli.render import progress_bars

    monkeypatch.setattr(progress_bars, "_QUIET_SECONDS", quiet_seconds)
    steps = [min(step, 40) for step in range(42)]
    jobs = [{**JOB, "progress": {**JOB["progress"], "step": step, "num_steps": 40}} for step in steps]
    jobs = [{**job, "status": "running"} for job in jobs] + [{**jobs[-1], "status": "succeeded"}]
    events = [f"event: job\nid: {i}\ndata: {json.dumps(job)}\n\n" for i, job in enumerate(jobs)]
    reply = Reply(body="".join(events).encode(), headers={"content-type": "text/event-stream"})
    service.on("GET", f"{JOBS}/ftjob-1/stream", reply)

    *lines, last = run("jobs", "watch", "ftjob-1").stderr.splitlines()

    assert len(lines) == num_lines
    assert lines[0].startswith("ftjob-1  running  step 0/40")
    assert lines[-1].startswith("ftjob-1  running  step 40/40")
    assert last == "Job ftjob-1 succeeded: None"


def test_watch_as_json_prints_json_lines_and_exits_with_1_on_failure(service: Script, run: Run) -> None:
    service.on("GET", f"{JOBS}/ftjob-1/stream", stream_of("running", "failed"))

    result = run("jobs", "watch", "ftjob-1", "--json")

    assert result.exit_code == 1
    assert [json.loads(line)["status"] for line in result.stdout.splitlines()] == ["running", "failed"]


def test_watch_follows_several_jobs_concurrently(service: Script, run: Run) -> None:
    for name in ("a", "b"):
        body = stream_of("running", "succeeded").body.replace(b"ftjob-1", name.encode())
        service.on("GET", f"{JOBS}/{name}/stream", Reply(body=body))

    result = run("jobs", "watch", "a", "b", "a")

    assert result.exit_code == 0
    assert "Job a succeeded: None" in result.stderr
    assert "Job b succeeded: None" in result.stderr


def test_watch_draws_progress_bars_in_a_terminal(service: Script, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorry import Lorry
    from lorry.cli.render import progress_bars

    service.on("GET", f"{JOBS}/ftjob-1/stream", stream_of("running", "succeeded"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    drawn: list[str] = []
    monkeypatch.setattr(progress_bars, "_draw", lambda _progress, _bar, job: drawn.append(progress_bars.facts(job)))

    with Lorry(service.url, "k") as lorry:
        jobs = progress_bars.watch(lorry, ["ftjob-1"], as_json=False)

    assert [job.status for job in jobs] == ["succeeded"]
    assert drawn == ["running  step 3/9  loss 1.500  480 tokens/s  1:01 left", "succeeded  step 3/9  loss 1.500"]


def test_events_prints_messages_oldest_first(service: Script, run: Run) -> None:
    events = [{"id": str(i), "created_at": 1790000000 + i, "level": "info", "message": f"m{i}"} for i in (2, 1)]
    service.on("GET", f"{JOBS}/j/events", {"data": events, "has_more": False})

    assert [line.split()[-1] for line in run("jobs", "events", "j").stdout.splitlines()] == ["m1", "m2"]
    assert [json.loads(line)["id"] for line in run("jobs", "events", "j", "--json").stdout.splitlines()] == ["1", "2"]
    assert [line.split()[-1] for line in run("jobs", "events", "j", "--limit", "1").stdout.splitlines()] == ["m2"]
    run("jobs", "events", "j", "--metrics", "-n", "500")
    queries = [request.path.partition("?")[2] for request in service.requests("GET", f"{JOBS}/j/events")]
    assert queries == ["type=message&limit=100", "type=message&limit=100", "type=message&limit=1", "limit=100"]


def test_events_follow_resumes_after_the_last_event_and_omits_metrics(service: Script, run: Run) -> None:
    events = [{"id": f"ftevent-{i}", "created_at": 1, "message": f"m{i}"} for i in (8, 7)]
    service.on("GET", f"{JOBS}/ftjob-1/events", {"data": events, "has_more": False})
    printed = [{"id": "9", "message": "loss", "type": "metrics"}, {"id": "10", "message": "end", "type": "message"}]
    body = "".join(f"event: event\nid: {event['id']}\ndata: {json.dumps(event)}\n\n" for event in printed)
    final = stream_of("succeeded").body
    service.on("GET", f"{JOBS}/ftjob-1/stream", Reply(body=body.encode() + final))

    lines = run("jobs", "events", "ftjob-1", "--follow").stdout.splitlines()
    everything = run("jobs", "events", "ftjob-1", "-f", "--metrics").stdout.splitlines()

    assert [line.split()[-1] for line in lines] == ["m7", "m8", "end"]
    assert [line.split()[-1] for line in everything] == ["m7", "m8", "loss", "end"]
    assert service.requests("GET", f"{JOBS}/ftjob-1/stream")[0].headers["last-event-id"] == "8"


def test_control_characters_are_replaced_and_markup_is_printed_literally(service: Script, run: Run) -> None:
    events = [{"id": "1", "created_at": 1, "level": "info", "message": "\x1b[31m[bold]red[/bold]\x07 \x9b \u202e é 好"}]
    service.on("GET", f"{JOBS}/j/events", {"data": events, "has_more": False})

    line = run("jobs", "events", "j").stdout

    assert "\ufffd[31m[bold]red[/bold]\ufffd \ufffd \ufffd é 好" in line


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
def test_job_action_prints_the_resulting_state(service: Script, run: Run, verb: str) -> None:
    service.on("POST", f"{JOBS}/j/{verb}", {**JOB, "id": "j", "cancel_requested": True})

    confirmation = ["--yes"] if verb == "cancel" else []

    assert "Job j is running, and will be cancelled within seconds." in run("jobs", verb, "j", *confirmation).stderr
    assert json.loads(run("jobs", verb, "j", "--json", *confirmation).stdout)["id"] == "j"


@pytest.mark.parametrize("verb", ["hold", "release"])
def test_hold_and_release_print_the_resulting_state(service: Script, run: Run, verb: str) -> None:
    service.on("POST", f"{JOBS}/j/{verb}", {**JOB, "id": "j", "status": "queued", "is_held": verb == "hold"})

    expected = run("jobs", verb, "j").stderr

    assert expected == (
        "Job j is queued and held. Release it with: lorry jobs release j\n" if verb == "hold" else "Job j is queued.\n"
    )


def test_move_accepts_exactly_one_position(service: Script, run: Run) -> None:
    service.on("POST", f"{JOBS}/j/move", {**JOB, "id": "j", "status": "queued"})

    assert run("jobs", "move", "j", "--before", "k").stderr == "Job j is queued.\n"
    assert run("jobs", "move", "j", "--last").stderr == "Job j is queued.\n"
    refused = run("jobs", "move", "j", "--last", "--first")

    assert [json.loads(seen.body) for seen in service.requests("POST", f"{JOBS}/j/move")] == [
        {"before": "k"},
        {"to": "last"},
    ]
    assert (refused.exit_code, "--before JOB" in refused.stderr) == (2, True)


def test_models_add_waits_until_the_model_is_ready(service: Script, run: Run) -> None:
    service.on("POST", "/v1/models", {"id": "m", "state": "importing"})
    service.on("GET", "/v1/models/m", {"id": "m", "state": "ready", "digest": "d1"})

    assert "Model m is ready, digest d1." in run("models", "add", "m", "org/name").stderr
    assert json.loads(run("models", "add", "m", "org/name", "--json").stdout)["digest"] == "d1"
    assert "Importing model m" in run("models", "add", "m", "org/name", "--no-wait").stderr


def test_models_add_shows_the_error_of_each_attempt_once(service: Script, run: Run) -> None:
    error = {"code": "out_of_space", "message": "The disk is full.", "remedy": "Free up space."}
    importing = {"id": "m", "state": "importing"}
    service.on("POST", "/v1/models", importing)
    waits = [importing, importing | {"error": error}, importing | {"error": error}]
    service.on("GET", "/v1/models/m", *waits, {"id": "m", "state": "ready", "digest": "d1"})

    lines = run("models", "add", "m", "org/name").stderr.splitlines()

    assert lines == ["Importing m…", "The disk is full. Free up space.", "Model m is ready, digest d1."]


@pytest.mark.parametrize(("given", "sent"), [("chatml", "chatml"), ("chat.jinja", "{{ messages }}")])
def test_models_add_sends_the_name_of_a_template_or_the_text_of_its_file(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, sent: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    service.on("POST", "/v1/models", {"id": "m", "state": "importing"})

    run("models", "add", "m", "org/name", "--chat-template", given, "--no-wait")

    assert json.loads(service.seen[-1].body)["chat_template"] == sent


def test_wait_without_a_terminal_prints_the_elapsed_time(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.cli.render.output.WAITING_SECONDS", 0.0)
    service.on("POST", "/v1/models", {"id": "m", "state": "importing"})
    service.on("GET", "/v1/models/m", {"id": "m", "state": "ready", "digest": "d1"})

    lines = run("models", "add", "m", "org/name").stderr.splitlines()

    assert lines[:2] == ["Importing m…", "Importing m… 0 s"]


def test_queue_report_and_show_print_the_response(service: Script, run: Run) -> None:
    service.on("GET", "/v1/queue", {"jobs": [{"job_id": "ftjob-1", "state": "queued", "position": 1}], "workers": 0})
    service.on("GET", "/v1/files/f/report", {"report": {"rows": 3000, "longest_row": 9}})
    service.on("GET", f"{JOBS}/j", {**JOB, "status": "queued"})
    service.on("GET", f"{JOBS}/j/why", {"explanation": "No worker.", "state": "queued"})

    assert "ftjob-1" in run("queue").stdout
    report = [" ".join(line.split()) for line in run("files", "report", "f", "--model", "m").stdout.splitlines()]
    assert report == ["file f", "model m", "rows 3,000", "longest row 9 tokens"]
    assert "No worker." in run("jobs", "show", "j").stdout


def test_sign_in_link_is_printed_and_opened_only_with_the_open_option(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or False)  # pyright: ignore
    link = {"url": "http://h/dashboard/#/sign-in/t", "expires_at": 1790000900}
    service.on("POST", "/v1/sign_in_links", link, link, link)

    printed = run("sign-in-link")
    assert printed.stdout == "http://h/dashboard/#/sign-in/t\n"
    assert "The link is valid once, until" in printed.stderr
    assert json.loads(run("sign-in-link", "--json").stdout) == link
    assert opened == []

    assert "No browser is available" in run("sign-in-link", "--open").stderr
    assert opened == ["http://h/dashboard/#/sign-in/t"]


def test_pull_into_an_unwritable_path_fails_without_a_traceback(service: Script, run: Run, tmp_path: Path) -> None:
    serve(service, tar())
    (tmp_path / "file").write_text("")

    result = run("adapters", "pull", "a", "file/below")

    assert result.exit_code == 1
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr


def lorry(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "lorry", *arguments]
    return subprocess.run(argv, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=250)


def test_version_and_shell_completion_work() -> None:
    assert lorry("--version").stdout.strip() == __version__
    # Otherwise Typer detects the parent shell. Under `make` that is sh, which supports no completion.
    named = lorry("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_LORRY_COMPLETE" in named.stdout
    completed = lorry(_LORRY_COMPLETE="complete_bash", COMP_WORDS="lorry jobs pa", COMP_CWORD="2").stdout
    assert completed.split() == ["pause"]


def test_ctrl_c_during_watch_exits_with_130_while_training_continues(service: Script) -> None:
    service.on("GET", f"{JOBS}/ftjob-1", JOB)
    argv = [sys.executable, "-m", "lorry", "jobs", "watch", "ftjob-1"]
    env = {**os.environ, "LORRY_URL": service.url}

    with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()

    assert "running" in first
    assert process.returncode == 130
    assert rest == "Stopped watching; training continues. Watch again with: lorry jobs watch ftjob-1\n"


@pytest.mark.parametrize("interrupted", ["typer", "httpx", "rich/console"])
def test_ctrl_c_during_imports_exits_with_130_without_a_traceback(
    service: Script, tmp_path: Path, interrupted: str
) -> None:
    service.on("GET", "/v1/queue", {"jobs": []})
    package, _, module = interrupted.rpartition("/")
    (tmp_path / package).mkdir(exist_ok=True)
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")

    done = lorry("queue", LORRY_URL=service.url, PYTHONPATH=str(tmp_path))

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_unexpected_exception_is_reported_as_a_bug_without_a_traceback(service: Script) -> None:
    service.on("GET", "/v1/queue", {"jobs": 3})

    done = lorry("queue", LORRY_URL=service.url)

    assert done.returncode == 1
    assert "This is a bug in lorry" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in lorry("queue", LORRY_URL=service.url, LORRY_TRACEBACK="1").stderr

"""`lorry jobs samples`: the answers to a job's sample prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from typer.testing import Result

from lorry.cli.render import output
from tests.lorry.scripted_server import Script

Run = Callable[..., Result]
EVENTS = "/v1/fine_tuning/jobs/j/events"


def event(step: int, *answers: tuple[str, bool]) -> dict[str, Any]:
    samples = [
        {"prompt": f"p{number}", "answer": text, "num_tokens": 3, "is_complete": is_complete}
        for number, (text, is_complete) in enumerate(answers)
    ]
    return {"id": f"ftevent-{step}", "created_at": 1, "message": "answers", "data": {"step": step, "samples": samples}}


def test_samples_are_grouped_by_step_oldest_first(service: Script, run: Run) -> None:
    others = {"id": "ftevent-9", "created_at": 1, "message": "m", "data": None}
    events = [event(4, ("four", True), ("\x1b[31mred", False)), others, event(0, ("base", False))]
    service.on("GET", EVENTS, {"data": events, "has_more": False})

    lines = [line for line in run("jobs", "samples", "j").stdout.splitlines() if line]

    assert lines == [
        "STEP 0",
        "> p0",
        "base ...",
        "STEP 4",
        "> p0",
        "four",
        "> p1",
        f"{output.clean(chr(27))}[31mred ...",
    ]
    printed = json.loads(run("jobs", "samples", "j", "--json").stdout)
    assert [each["step"] for each in printed] == [4, 4, 0]


def test_job_without_samples_shows_how_to_request_them(service: Script, run: Run) -> None:
    service.on("GET", EVENTS, {"data": [], "has_more": False})

    printed = run("jobs", "samples", "j")

    assert printed.stdout == ""
    assert "--set 'evaluation.samples.prompts=" in printed.stderr

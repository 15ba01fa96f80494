"""Latency of the whole service: from the submission of a job until its client sees the loss of the first step.

The base model is loaded. Measured for a known training file and for a new one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, shares
from benchmarks.workload import ROOT
from lorry import Lorry

GOAL_SECONDS = 1.0
LOOK_SECONDS = 0.01
PATIENCE_SECONDS = 600.0
STOP_SECONDS = 90.0
NAME = "base"


def run(plan: Plan) -> Result:
    """The first job loads the base model. Then jobs alternate between its file and new files."""
    result = Result(theme="submission", settings=plan.settings() | {"batch_size": 1, "rows": len(plan.workload.texts)})
    result.repeats = {"known file": [], "new file": []}
    with service(plan.folder) as lorry:
        lorry.models.add(NAME, str(plan.workload.base), kind="folder")
        lorry.models.wait(NAME, timeout_seconds=PATIENCE_SECONDS)
        known = _upload(plan, lorry, 0)
        result.repeats["first job"] = [_first_step(plan, lorry, known)]
        for turn in range(plan.repeats):
            result.repeats["known file"].append(_first_step(plan, lorry, known))
            result.repeats["new file"].append(_first_step(plan, lorry, _upload(plan, lorry, turn + 1)))
    result.find("Submission to first step, base model not loaded", result.repeats["first job"][0]["seconds"], "s")
    for kind, at_most in (("known", GOAL_SECONDS), ("new", None)):
        what, reports = f"Submission to first step, {kind} training file", result.repeats[f"{kind} file"]
        result.find(what, median_of(reports, "seconds"), "s", at_most=at_most)
        result.find(f"{what}: until the job is running", median_of(reports, "running_seconds"), "s")
    return result


@contextmanager
def service(folder: Path) -> Generator[Lorry]:
    """Run `lorry up` in a new data folder within `folder`, and stop it at the end."""
    data_dir = Path(tempfile.mkdtemp(prefix="service-", dir=folder))
    log = data_dir.with_suffix(".log")
    argv = [sys.executable, "-m", "lorry", "up", "--json", "--devices", "cpu", "--data-dir", str(data_dir)]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, "LORRY_REQUESTS_PER_MINUTE": "0"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        ready = process.stdout.readline() if process.stdout else ""
        if not ready:
            raise RuntimeError(f"the service did not start:\n{log.read_text('utf-8', 'replace')}")
        with Lorry(data_dir=data_dir) as lorry:
            yield lorry
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
            process.wait()


def _upload(plan: Plan, lorry: Lorry, number: int) -> str:
    """Upload the plan's rows with a first row that depends on `number`, so that each number is a new file."""
    rows = [(f"File {number}?", "A file."), *plan.workload.texts]
    path = plan.folder / f"rows-{number}.jsonl"
    lines = (json.dumps({"prompt": question, "completion": f" {answer}"}) for question, answer in rows)
    path.write_text("\n".join(lines), "utf-8")
    return lorry.files.upload(path).id


def _first_step(plan: Plan, lorry: Lorry, file: str) -> dict[str, float]:
    """Return the seconds from the request until the job runs, and until its first loss is visible."""
    started = time.monotonic()
    job = lorry.jobs.create(
        model=NAME,
        training_file=file,
        max_steps=2,
        hyperparameters={"batch_size": 1},
        lora={"rank": plan.rank},
        precision="bfloat16" if plan.dtype == "bfloat16" else "float32",
    )
    running = None
    while not lorry.jobs.metrics(job.id):
        shown = lorry.jobs.get(job.id)
        now = time.monotonic()
        has_started = shown.status == "running" or shown.is_final
        running = now if running is None and has_started else running
        has_no_step = shown.is_final and not lorry.jobs.metrics(job.id)  # the steps may have come since the last look
        if has_no_step or now - started > PATIENCE_SECONDS:
            raise RuntimeError(f"the job made no step: {shown}")
        time.sleep(LOOK_SECONDS)
    seconds = time.monotonic() - started
    lorry.jobs.wait(job.id, timeout_seconds=PATIENCE_SECONDS, poll_seconds=0.1)
    return {"seconds": seconds, "running_seconds": seconds if running is None else running - started}


def explain(_plan: Plan, result: Result) -> None:
    for name in ("known file", "new file"):
        claimed, seconds = (median_of(result.repeats[name], field) for field in ("running_seconds", "seconds"))
        parts = {"until a worker has claimed it": claimed, "admission, step, and news of it": seconds - claimed}
        result.profile += shares(f"a {name}, by the clock", parts)
    known, new = (median_of(result.repeats[name], "running_seconds") for name in ("known file", "new file"))
    result.why.append(
        f"A job on a known file is claimed after {known:.2f} s, on a new one after {new:.2f} s, because a process "
        "tokenizes it first. The rest is the admission and the step, both measured by warm_start, and at most 0.05 s "
        "until the worker reads the event of the step."
    )

"""Step 4: measures this machine with a short job, and chooses how much the demo trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

from demo_parts.report import DemoFailed, console, waiting

TARGET_SECONDS = 225
"""Everything after the installation takes about this long on slow and fast machines."""
RESERVED_SECONDS = 50
"""For the verification of three adapters, the PEFT check and the shutdown."""
NUM_JOBS = 3
MEASURED_BATCH = 4
_MEASURED_SECONDS = 3.0
_MOST_MEASURED_STEPS = 200
_POLL_SECONDS = 0.1
_LIMIT_SECONDS = 600.0
_FINAL = frozenset({"succeeded", "failed", "cancelled"})
_EVALUATIONS = 2
"""The base model before the first step, and the adapter after the last."""
_FORWARD_PART = 1 / 3
"""A forward pass costs a third of a training step of the same rows."""
_HELD_OUT_PART = 0.15
_HELD_OUT_ROWS = range(12, 57)
_STEPS = range(16, 61)
_FEWEST_STEPS_OF_BATCH_4 = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The amount of work of each of the three jobs."""

    steps: int
    batch_size: int
    held_out_rows: int

    def seconds(self, row_seconds: float) -> float:
        """Return the estimated training time. `row_seconds` is the time of one training row."""
        evaluated = self.held_out_rows * _EVALUATIONS * _FORWARD_PART
        return NUM_JOBS * row_seconds * (self.steps * self.batch_size + evaluated)


def choose(row_seconds: float, seconds: float) -> Size:
    """Return the largest size whose estimated training time fits `seconds`; the smallest size if none fits."""
    rows = seconds / row_seconds / NUM_JOBS
    held_out = _clamp(rows * _HELD_OUT_PART / (_EVALUATIONS * _FORWARD_PART), _HELD_OUT_ROWS)
    trained = rows - held_out * _EVALUATIONS * _FORWARD_PART
    batch_size = 4 if trained / 4 >= _FEWEST_STEPS_OF_BATCH_4 else 2
    return Size(steps=_clamp(trained / batch_size, _STEPS), batch_size=batch_size, held_out_rows=held_out)


def measure(client: OpenAI, base: str, training_file: str, job: dict[str, Any]) -> float:
    """Return the seconds that one row takes in training. Trains a few steps and cancels the job.

    Raises DemoFailed if the job ends before its third step.
    """
    job_id = client.fine_tuning.jobs.create(
        model=base,
        training_file=training_file,
        suffix="speed",
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": MEASURED_BATCH}}},
        extra_body={**job, "max_steps": _MOST_MEASURED_STEPS},
    ).id
    with waiting("Loading the base model and measuring this machine"):
        row_seconds, loss = _timed(client, job_id)
    client.fine_tuning.jobs.cancel(job_id)
    for polled in _polled(client, job_id):  # it shares the trainer until it ends
        if polled["status"] in _FINAL:
            break
    console.print(f"First loss {loss:.3f}; {1 / row_seconds:.1f} rows a second")
    return row_seconds


def _timed(client: OpenAI, job_id: str) -> tuple[float, float]:
    """Return seconds per row, from the first finished step on, and the first loss."""
    began, first_step, step, loss = 0.0, 0, 0, 0.0
    polls = _polled(client, job_id)
    while True:
        job = next(polls)
        progress = job.get("progress") or {}
        step, now = int(progress.get("step") or 0), time.monotonic()
        if step and not first_step:
            began, first_step, loss = now, step, float(progress["loss"])
        if step > first_step and now - began >= _MEASURED_SECONDS:
            return (now - began) / (step - first_step) / MEASURED_BATCH, loss
        if job["status"] in _FINAL:
            raise DemoFailed(f"The job that measures the machine {job['status']} at step {step}: {job.get('error')}")


def _polled(client: OpenAI, job_id: str) -> Iterator[dict[str, Any]]:
    """Yield the state of the job again and again. Raises DemoFailed after `_LIMIT_SECONDS`."""
    ends = time.monotonic() + _LIMIT_SECONDS
    while time.monotonic() < ends:
        yield client.fine_tuning.jobs.retrieve(job_id).to_dict()
        time.sleep(_POLL_SECONDS)
    raise DemoFailed(
        f"The job that measures the machine, {job_id}, did not finish within {_LIMIT_SECONDS:.0f} s. "
        "Look for the cause in the log of the service, .cache/demo/lorry-up.log, then run `make demo` again."
    )


def _clamp(value: float, allowed: range) -> int:
    return min(max(int(value), allowed.start), allowed.stop - 1)

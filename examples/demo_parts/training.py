"""Steps 4 to 6: upload and train with the unchanged openai client, collect results, verify them in a clean process."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from demo_parts.report import DemoFailed, bars, console, draw, waiting
from lorry import Conflict, Lorry, LorryError
from lorry.models.jobs import Adapter, Attempt, Job, Model

MAX_STEPS = 48
BATCH_SIZE = 4
EVALUATE_EVERY = 24
VARIANTS = (
    {"suffix": "small", "rank": 4, "learning_rate": 4e-3, "seed": 1},
    {"suffix": "medium", "rank": 8, "learning_rate": 2e-3, "seed": 2},
    {"suffix": "large", "rank": 16, "learning_rate": 1e-3, "seed": 3},
)
NUM_ASKED = 16
"""Number of validation functions, from the start of the file, for which answers are generated."""
_OURS = {"made_by": "make demo"}
"""Metadata of the demo's jobs, with which it finds jobs that an interrupted run left behind."""
_POLL_SECONDS = 0.5
_CHECK_SECONDS = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A job that succeeded, with its attempts, its adapter and its lineage. Losses are means per trained token of the
    validation file."""

    job: Job
    attempts: list[Attempt]
    adapter: Adapter
    lineage: dict[str, Any]

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def loss(self) -> float:
        return self.adapter.evaluation.loss or float("nan")

    @property
    def base_loss(self) -> float:
        return self.adapter.evaluation.base_loss or float("nan")

    @property
    def seconds(self) -> float:
        """Time in trainers over all attempts, without waiting and pauses."""
        return self.job.seconds_running or 0.0

    @property
    def trainers(self) -> set[str]:
        """All trainers of the job."""
        return {str(attempt.trainer_id) for attempt in self.attempts}


def train(lorry: Lorry, base: str, train_path: Path, held_out_path: Path) -> list[str]:
    """Train three jobs, created at once with OpenAI's own client. Fields of Lorry are passed in extra_body."""
    _cancel_left_over(lorry)
    try:
        return _train(lorry, base, train_path, held_out_path)
    except BaseException:
        with contextlib.suppress(LorryError):  # the service itself may have failed
            _cancel_left_over(lorry)
        raise


def outcomes(lorry: Lorry, job_ids: list[str]) -> list[Outcome]:
    """Return the outcomes. Raises DemoFailed if a job did not succeed."""
    found: list[Outcome] = []
    for job_id in job_ids:
        job = lorry.jobs.get(job_id)
        if job.status != "succeeded" or job.adapter_id is None:
            why = job.error.message if job.error else "see its log"
            raise DemoFailed(f"{job_id} {job.status}: {why}")
        attempts, adapter = lorry.jobs.attempts(job_id), lorry.adapters.get(job.adapter_id)
        lineage = lorry.adapters.lineage(job.adapter_id)
        found.append(Outcome(job=job, attempts=attempts, adapter=adapter, lineage=lineage))
    return found


def check(lorry: Lorry, base: Model, best: Outcome, questions: list[str], root: Path) -> dict[str, Any]:
    """Pull the adapter, and run check_adapter.py in an isolated interpreter."""
    if base.local_path is None:
        raise DemoFailed("The service does not return the base model's path, which requires an operator key.")
    folder = root / "adapters" / best.adapter.id
    shutil.rmtree(folder, ignore_errors=True)
    lorry.adapters.pull(best.name, folder)
    asked = root / "questions.json"
    asked.write_text(json.dumps(questions), "utf-8")
    script = Path(__file__).parent.parent / "check_adapter.py"
    argv = [sys.executable, "-I", str(script), base.local_path, str(folder), str(asked)]
    try:
        with waiting("Generating answers of the base model and the best adapter with PEFT"):
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired as late:
        raise DemoFailed(f"check_adapter.py did not finish within {_CHECK_SECONDS} s.") from late
    if done.returncode:
        raise DemoFailed(f"check_adapter.py failed:\n{done.stderr[-2000:].strip()}")
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": str(folder)}


def problems(found: list[Outcome], checked: dict[str, Any]) -> list[str]:
    """Return the violated expectations as sentences."""
    worse = [o.name for o in found if not o.loss < o.base_loss]
    sentences = [f"The validation loss of {name} is not below that of the base model." for name in worse]
    if not shared_trainers(found):
        named = sorted(set[str]().union(*(o.trainers for o in found)))
        sentences.append(f"The jobs did not train together: their trainers are {', '.join(named)}.")
    if not checked["agrees"]:
        sentences.append("PEFT's logits differ from those of training by more than rounding explains.")
    if checked["imported_of_lorry"]:
        sentences.append(f"The isolated process imported packages of Lorry: {', '.join(checked['imported_of_lorry'])}.")
    return sentences


def shared_trainers(found: list[Outcome]) -> set[str]:
    """Return the trainers in which all of the jobs trained, by the jobs' attempts."""
    return set[str].intersection(*(o.trainers for o in found))


def _train(lorry: Lorry, base: str, train_path: Path, held_out_path: Path) -> list[str]:
    client = OpenAI(base_url=f"{lorry.url}/v1", api_key=lorry.api_key or "none")
    training = client.files.create(file=train_path, purpose="fine-tune")
    held_out = client.files.create(file=held_out_path, purpose="fine-tune")
    console.print(f"Uploaded {training.id} and {held_out.id}")
    jobs = [
        client.fine_tuning.jobs.create(
            model=base,
            training_file=training.id,
            validation_file=held_out.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": BATCH_SIZE}}},
            seed=variant["seed"],
            suffix=variant["suffix"],
            metadata=_OURS,
            extra_body={
                "lora": {"rank": variant["rank"]},
                "optimizer": {"learning_rate": variant["learning_rate"]},
                "evaluation": {"every_steps": EVALUATE_EVERY},
                "max_steps": MAX_STEPS,
            },
        )
        for variant in VARIANTS
    ]
    _show_until_done(client, jobs)
    return [job.id for job in jobs]


def _cancel_left_over(lorry: Lorry) -> None:
    """Cancel unfinished jobs of an interrupted run, so that they don't train together with those of this run."""
    for job in lorry.jobs.list():
        if not job.is_final and job.metadata == _OURS:
            with contextlib.suppress(Conflict):  # the job has ended since it was listed
                lorry.jobs.cancel(job.id)


def _show_until_done(client: OpenAI, jobs: list[FineTuningJob]) -> None:
    """Show a bar per job, from the field `progress` that Lorry adds to OpenAI's job."""
    with bars() as progress:
        tasks = {job.id: progress.add_task(str(job.to_dict().get("suffix")), total=MAX_STEPS, facts="") for job in jobs}
        open_jobs = set(tasks)
        while open_jobs:
            for job_id in sorted(open_jobs):
                job = client.fine_tuning.jobs.retrieve(job_id)
                draw(progress, tasks[job_id], job.to_dict())
                if job.status in {"succeeded", "failed", "cancelled"}:
                    open_jobs.discard(job_id)
            time.sleep(_POLL_SECONDS)

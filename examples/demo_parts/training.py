"""Steps 4 to 7: uploads and trains with the unchanged openai client, then downloads and checks in a clean process."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from demo_parts import sizing
from demo_parts.report import DemoFailed, bars, draw, waiting
from demo_parts.sizing import Size
from lorry import Conflict, Lorry, LorryError
from lorry.models import Adapter, Attempt, Job, Model

VARIANTS = (
    {"suffix": "small", "rank": 4, "learning_rate": 4e-3, "seed": 1},
    {"suffix": "medium", "rank": 8, "learning_rate": 2e-3, "seed": 2},
    {"suffix": "large", "rank": 16, "learning_rate": 1e-3, "seed": 3},
)
NUM_ASKED = 16
"""The base model and the best adapter answer questions about the first functions of the validation file."""
_OURS = {"made_by": "make demo"}
"""Metadata of the demo's jobs. The next run finds the jobs of an interrupted run by it."""
_POLL_SECONDS = 0.5
_CHECK_SECONDS = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A succeeded job with its attempts, its adapter and the lineage record. Losses are means per trained token of the
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
        """The sum of all attempts, without waiting and pauses."""
        return self.job.seconds_running or 0.0

    @property
    def trainers(self) -> set[str]:
        """The trainers of all attempts."""
        return {str(attempt.trainer_id) for attempt in self.attempts}


@dataclass(frozen=True, kw_only=True, slots=True)
class Uploaded:
    """A client of the service and the id of the training file."""

    client: OpenAI
    training_file: str


def upload(lorry: Lorry, train_path: Path) -> Uploaded:
    """Cancel the jobs of an interrupted run, and upload the training file."""
    _cancel_left_over(lorry)
    client = OpenAI(base_url=f"{lorry.url}/v1", api_key=lorry.api_key or "none")
    return Uploaded(client=client, training_file=client.files.create(file=train_path, purpose="fine-tune").id)


def measure(lorry: Lorry, base: str, uploaded: Uploaded) -> float:
    """Return the seconds that one row takes in training on this machine."""
    with _cancelling(lorry):
        job = {"lora": {"rank": VARIANTS[1]["rank"]}, "metadata": _OURS}
        return sizing.measure(uploaded.client, base, uploaded.training_file, job)


def train(lorry: Lorry, base: str, uploaded: Uploaded, held_out_path: Path, size: Size) -> list[str]:
    """Create three jobs at once, and return their ids when all have ended."""
    with _cancelling(lorry):
        return _train(uploaded, base, held_out_path, size)


@contextlib.contextmanager
def _cancelling(lorry: Lorry) -> Generator[None]:
    """Cancel the demo's jobs if the body fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(LorryError):  # the service may be what failed
            _cancel_left_over(lorry)
        raise


def outcomes(lorry: Lorry, job_ids: list[str]) -> list[Outcome]:
    """Return the outcomes of the jobs. Raises DemoFailed if a job did not succeed."""
    found: list[Outcome] = []
    for job_id in job_ids:
        job = lorry.jobs.get(job_id)
        if job.status != "succeeded" or job.adapter_id is None:
            why = job.error.message if job.error else f"see `lorry jobs logs {job_id}`"
            raise DemoFailed(f"Job {job_id} {job.status}: {why}")
        attempts, adapter = lorry.jobs.attempts(job_id), lorry.adapters.get(job.adapter_id)
        lineage = lorry.adapters.lineage(job.adapter_id)
        found.append(Outcome(job=job, attempts=attempts, adapter=adapter, lineage=lineage))
    return found


def check(lorry: Lorry, base: Model, best: Outcome, questions: list[str], root: Path) -> dict[str, Any]:
    """Download the adapter, and run check_adapter.py in an isolated interpreter."""
    if base.local_path is None:
        raise DemoFailed("The service does not show the folder of the base model. Use an operator key.")
    folder = root / "adapters" / best.adapter.id
    shutil.rmtree(folder, ignore_errors=True)
    lorry.adapters.pull(best.name, folder)
    asked = root / "questions.json"
    asked.write_text(json.dumps(questions), "utf-8")
    script = Path(__file__).parent.parent / "check_adapter.py"
    argv = [sys.executable, "-I", str(script), base.local_path, str(folder), str(asked)]
    try:
        with waiting("Generating answers of the base model and the best adapter, with PEFT only"):
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired as late:
        raise DemoFailed(f"check_adapter.py did not finish within {_CHECK_SECONDS} s.") from late
    if done.returncode:
        raise DemoFailed(f"check_adapter.py failed:\n{done.stderr[-2000:].strip()}")
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": str(folder)}


def problems(found: list[Outcome], checked: dict[str, Any]) -> list[str]:
    """Return a sentence for each condition of success that does not hold."""
    worse = [o.name for o in found if not o.loss < o.base_loss]
    sentences = [f"The validation loss of {name} is not below the base model's." for name in worse]
    if not shared_trainers(found):
        named = sorted(set[str]().union(*(o.trainers for o in found)))
        sentences.append(f"The jobs did not train in one trainer: their trainers are {', '.join(named)}.")
    if not checked["agrees"]:
        sentences.append("PEFT's logits differ from the training logits by more than rounding.")
    if checked["imported_of_lorry"]:
        sentences.append(
            f"The check was not independent: its process imported {', '.join(checked['imported_of_lorry'])}."
        )
    return sentences


def shared_trainers(found: list[Outcome]) -> set[str]:
    """Return the trainers that trained all of the jobs."""
    return set[str].intersection(*(o.trainers for o in found))


def _train(uploaded: Uploaded, base: str, held_out_path: Path, size: Size) -> list[str]:
    client = uploaded.client
    held_out = client.files.create(file=held_out_path, purpose="fine-tune")
    jobs = [
        client.fine_tuning.jobs.create(
            model=base,
            training_file=uploaded.training_file,
            validation_file=held_out.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": size.batch_size}}},
            seed=variant["seed"],
            suffix=variant["suffix"],
            metadata=_OURS,
            extra_body={
                "lora": {"rank": variant["rank"]},
                "optimizer": {"learning_rate": variant["learning_rate"]},
                "evaluation": {"every_steps": size.steps},
                "max_steps": size.steps,
            },
        )
        for variant in VARIANTS
    ]
    _show_until_done(client, jobs, size.steps)
    return [job.id for job in jobs]


def _cancel_left_over(lorry: Lorry) -> None:
    """Cancel unfinished jobs of an earlier, interrupted run."""
    for job in lorry.jobs.list():
        if not job.is_final and job.metadata == _OURS:
            with contextlib.suppress(Conflict):  # the job ended after it was listed
                lorry.jobs.cancel(job.id)


def _show_until_done(client: OpenAI, jobs: list[FineTuningJob], steps: int) -> None:
    """Show a bar per job, from the field `progress` that Lorry adds to OpenAI's job."""
    with bars() as progress:
        tasks = {job.id: progress.add_task(str(job.to_dict().get("suffix")), total=steps, facts="") for job in jobs}
        open_jobs = set(tasks)
        while open_jobs:
            for job_id in sorted(open_jobs):
                job = client.fine_tuning.jobs.retrieve(job_id)
                draw(progress, tasks[job_id], job.to_dict())
                if job.status in {"succeeded", "failed", "cancelled"}:
                    open_jobs.discard(job_id)
            time.sleep(_POLL_SECONDS)

"""A real trainer process, launched as a worker does it, and observed through its directory."""

from __future__ import annotations

import re
import time
from pathlib import Path
from shutil import copyfile
from typing import Any

from benchmarks.plan import Plan
from benchmarks.workload import SEED
from catalog.spec.job import JobRequest, resolve
from tests.worker.trainer_settings import trainer_settings
from worker.node import devices
from worker.process.launcher import launch
from worker.protocol.mailbox import EventReader, InboxWriter, TrainerDirectory

LOOK_SECONDS = 0.002
LONGEST_SILENCE_SECONDS = 3600.0


class Trainer:
    """Context manager that starts a trainer and stops it. Times are measured by this process's clock."""

    def __init__(self, plan: Plan, name: str) -> None:
        self._plan = plan
        self._directory = TrainerDirectory.create(plan.folder / name)
        self._inbox, self._events = InboxWriter(self._directory), EventReader(self._directory)
        self._heard: list[dict[str, Any]] = []

    def __enter__(self) -> Trainer:
        base = self._plan.workload.base
        self._process = launch(
            self._directory, devices.cpu(), bases_dir=base.parent, silence_seconds=LONGEST_SILENCE_SECONDS
        )
        self._process.begin(trainer_settings(base, trainer_id=self._directory.path.name, dtype=self._plan.dtype))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def admit(self, job: str, *, num_steps: int, batch_size: int) -> None:
        """Admit a job with this name on the plan's rows."""
        tokens = self._directory.job_path(job) / "train/tokens.safetensors"
        tokens.parent.mkdir(parents=True)
        copyfile(self._plan.workload.tokens, tokens)
        asked = {"hyperparameters": {"batch_size": batch_size}, "lora": {"rank": self._plan.rank}}
        request = JobRequest.model_validate({"model": "base", "training_file": "file", **asked})
        spec = resolve(request, num_rows=100, max_positions=None, seed=SEED).model_dump(mode="json")
        self._inbox.send(
            "admit",
            claim_id=job,
            job_id=job,
            base_name="base",
            base_revision=None,
            spec=spec,
            num_steps=num_steps,
            evaluate_every_steps=None,
            checkpoint_every_steps=num_steps,
            answered_steps=[],
            asks_as_chat=False,
            shortages=0,
            train=str(tokens.relative_to(self._directory.path)),
            valid=None,
            resume=None,
            parent=None,
            trace=None,
        )

    def peak_bytes(self) -> int:
        """Return the trainer's peak memory so far, as Linux reports it."""
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{self._process.pid}/status").read_text(), re.MULTILINE)
        assert found, "this comparison needs Linux"
        return int(found[1]) * 1024

    def wait_for(self, event_type: str, job: str | None = None, *, count: int = 1) -> dict[str, Any]:
        """Return the `count`-th such event since the start. Raises RuntimeError if the trainer exits or rejects it."""
        while True:
            new = self._events.read()
            self._heard += new
            found = [e for e in self._heard if e["type"] == event_type and job in (None, e.get("claim_id"))]
            if len(found) >= count:
                return found[count - 1]
            refused = [e for e in new if e["type"] in ("refused", "load_refused", "diverged")]
            if refused or self._process.returncode is not None:
                raise RuntimeError(f"the trainer failed: {refused}\n{self._directory.log_tail()}")
            time.sleep(LOOK_SECONDS)

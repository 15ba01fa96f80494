"""What a trainer says in its log of the jobs that it holds: what it tells its worker, a line each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from catalog import logs, tracing
from catalog.logs import Subjects
from worker.protocol.mailbox import Json

log = logging.getLogger("worker.trainer")
NUMBERS = ("step", "num_steps", "kept_step", "num_parameters", "trained_tokens")
"""What of an event is in its line."""


def open_log() -> None:
    """For all that is logged in this process, by libraries too."""
    logs.configure("info")


class TrainerLog:
    """By claim, what its lines are about."""

    def __init__(self, settings: Json, *, speaks: bool) -> None:
        """settings: the trainer's. speaks: False of a rank whose leader says all there is to say."""
        self._trainer_id = str(settings.get("trainer_id", ""))
        self._speaks = speaks
        self._subjects: dict[str, Subjects] = {}

    def knows(self, admit: Json) -> str:
        """The claim of a job that is to be admitted, of which lines may tell from here on."""
        claim_id = str(admit["claim_id"])
        trace = tracing.trace_id(admit.get("trace"))
        self._subjects[claim_id] = {
            "job": admit.get("job_id"), "claim": claim_id, "trainer": self._trainer_id, "trace": trace,
        }  # fmt: skip
        return claim_id

    def told(self, claim_id: str, event_type: str, body: Mapping[str, Any]) -> None:
        """An event of a job."""
        if not self._speaks:
            return
        error: Json | None = body.get("error")
        numbers = [f"{name}={body[name]}" for name in NUMBERS if name in body]
        code = [f"code={error['code']}"] if error is not None else []
        with logs.about(self._subjects.get(claim_id, {"claim": claim_id, "trainer": self._trainer_id})):
            log.log(logging.WARNING if error is not None else logging.INFO, " ".join([event_type, *numbers, *code]))

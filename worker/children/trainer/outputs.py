"""Inputs and outputs of the trainer for one job: data sets, the adapter, prompts and answers, events and log lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from catalog import failpoints, logs, tracing
from catalog.logs import Subjects
from catalog.spec.training import Samples
from lora_core.data.token_dataset import TokenDataset
from lora_core.distributed.ranks import Ranks
from lora_core.engine.engine import Engine
from lora_core.errors import BrokenPass, LoraCoreError
from lora_core.events import Event, JobDiverged, JobEvaluated, JobFinished, JobStepped
from lora_core.forward.generation import Prompts
from lora_core.forward.progress_hooks import Between
from lora_core.runtime.device_errors import is_device_fault, shortage_of
from worker.children.tokenizer.text_encoder import BaseText
from worker.protocol.errors import print_handled
from worker.protocol.mailbox import Json, timed

EVENT_TYPES = {JobStepped: "stepped", JobEvaluated: "evaluated", JobFinished: "finished", JobDiverged: "diverged"}


def datasets_of(
    job: str, train: Path | None, valid: Path | None, ranks: Ranks
) -> tuple[TokenDataset, TokenDataset | None]:
    """Return a job's training and validation data. Raises LoraCoreError, on every rank."""
    assert train is not None
    with ranks.sharing_errors(), shortage_of(job, part="data"):
        return TokenDataset.load(train), TokenDataset.load(valid) if valid else None


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseReference:
    """The base model in adapter_config.json: its id on the Hub with the commit, or else its name in Lorry."""

    name: str
    revision: str | None


def exported(
    engine: Engine,
    job: str,
    folder: Path,
    *,
    base: BaseReference,
    between: Between,
    on_verified_linear: Between,
    spans: list[Json],
) -> Json | None:
    """Export a job's adapter to `folder`, and verify it with PEFT. Returns the report; None on ranks other than the
    leader.

    `between` is called after each linear layer of the export, `on_verified_linear` after each one of the
    verification. Spans for traces are added to `spans`. A sharded base model computes only on all ranks together, so
    each rank exports, to its own folder, and all ranks begin each part together. Raises LoraCoreError and OSError, on
    every rank; BrokenPass on a rank that ran out of memory while the others wait for it.
    """
    ranks = engine.ranks
    engine.compare_ranks(job)

    def written(place: Path) -> None:
        began_at = time.time()
        engine.export(job, place, base_name=base.name, base_revision=base.revision, between=between)
        spans.append(timed("export", began_at))

    def verified(place: Path) -> Json:
        from lora_core.peft_format.verify import verify_export  # imports PEFT, which takes a second

        def report_progress() -> None:
            on_verified_linear()
            failpoints.pass_by("verifying")

        began_at = time.time()
        report = asdict(verify_export(engine.base, place, between=report_progress))
        spans.append(timed("verify", began_at))
        return report

    if not engine.base.is_sharded:
        with ranks.sharing_errors(), _blamed_on_adapter():
            if not ranks.leads:
                return None
            written(folder)
            return verified(folder)
    with ExitStack() as stack:
        with ranks.sharing_errors():
            place = folder if ranks.leads else Path(stack.enter_context(TemporaryDirectory())) / "adapter"
        with ranks.sharing_errors(), _blamed_on_adapter():
            written(place)
        with ranks.sharing_errors(), _blamed_on_adapter():
            report = verified(place)
        return report if ranks.leads else None


@contextmanager
def _blamed_on_adapter() -> Generator[None]:
    """Convert an unexpected error to one of this adapter, so that its packmates are not affected. A fault of the device
    is raised unchanged, because it affects all jobs."""
    try:
        yield
    except (LoraCoreError, OSError, BrokenPass):
        raise
    except Exception as error:
        if is_device_fault(error):
            raise
        from lora_core.peft_format.verify import unverifiable

        print_handled(error)
        raise unverifiable(error) from error


def steps_to_sample(events: list[Event]) -> dict[str, int]:
    """Return, by job, the step whose weights the engine holds now. A finished job may have gone back to its best
    step."""
    steps = {event.job: event.step for event in events if isinstance(event, JobEvaluated)}
    kept = {event.job: event.kept_step for event in events if isinstance(event, JobFinished) and event.job in steps}
    return steps | kept


def prompts_of(request: SampleRequest) -> Prompts:
    return Prompts(prompts=request.ids, max_tokens=request.max_tokens, end_ids=request.end_ids)


def as_json(event: Event) -> Json:
    body = asdict(event)
    if body.get("rewards"):
        body["rewards"] = {name: value for name, value in body["rewards"].items() if value is not None}
    return {"type": EVENT_TYPES[type(event)], "claim_id": body.pop("job"), **body}


@dataclass(kw_only=True, slots=True)
class AdmittedJob:
    """One job that the trainer has admitted."""

    checkpoint_every_steps: int
    base: BaseReference
    num_steps: int
    sample_request: SampleRequest | None = None
    """The prompts that it answers at each evaluation."""
    saved_step: int
    """The step of the newest checkpoint that was reported, or of the one from which the job resumed. 0: none.
    Of several ranks, the leader knows it."""

    def is_checkpoint_due(self, step: int) -> bool:
        """Return whether a checkpoint is due. The last step needs none, because the adapter is exported after it."""
        return step % self.checkpoint_every_steps == 0 and step < self.num_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One job's prompts, with the tokens that end an answer."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    max_tokens: int
    end_ids: frozenset[int]


def sample_request(base: BaseText, samples: Samples, *, as_chat: bool) -> SampleRequest:
    """Encode a job's prompts. as_chat: render each prompt as a user turn with the chat template. Raises Refused if the
    template rejects it."""
    return SampleRequest(
        texts=tuple(samples.prompts),
        ids=tuple(base.prompt_ids(prompt, as_chat=as_chat) for prompt in samples.prompts),
        max_tokens=samples.max_tokens,
        end_ids=base.end_ids(as_chat=as_chat),
    )


def sample_records(base: BaseText, request: SampleRequest, answers: list[tuple[int, ...]]) -> list[Json]:
    """Return prompts with answers, for users. `is_complete`: the answer ended within max_tokens."""
    return [
        {
            "prompt": prompt,
            "answer": base.text_of(ids),
            "num_tokens": len(ids),
            "is_complete": bool(ids) and ids[-1] in request.end_ids,
        }
        for prompt, ids in zip(request.texts, answers, strict=True)
    ]


log = logging.getLogger("worker.trainer")
NUMBERS = ("step", "num_steps", "kept_step", "num_parameters", "trained_tokens")
"""The fields of an event that its log line contains."""


class TrainerLog:
    """Writes log lines about the events of jobs, with the subjects of their claims."""

    def __init__(self, settings: Json, *, logs_events: bool) -> None:
        """settings: the trainer's. logs_events: False for ranks other than the leader, which log no events."""
        self._trainer_id = str(settings["trainer_id"])
        self._logs_events = logs_events
        self._subjects: dict[str, Subjects] = {}

    def register(self, admit: Mapping[str, Any]) -> str:
        """Register the job of an `admit` message, so that lines may refer to it. Returns its claim."""
        claim_id = str(admit["claim_id"])
        trace = tracing.trace_id(admit["trace"])
        self._subjects[claim_id] = {
            "job": admit["job_id"], "claim": claim_id, "trainer": self._trainer_id, "trace": trace,
        }  # fmt: skip
        return claim_id

    def record_event(self, claim_id: str, event_type: str, body: Mapping[str, Any]) -> None:
        """Log an event of a job."""
        if not self._logs_events:
            return
        error: Json | None = body.get("error")
        numbers = [f"{name}={body[name]}" for name in NUMBERS if name in body]
        code = [f"code={error['code']}"] if error is not None else []
        with logs.about(self._subjects.get(claim_id, {"claim": claim_id, "trainer": self._trainer_id})):
            log.log(logging.WARNING if error is not None else logging.INFO, " ".join([event_type, *numbers, *code]))

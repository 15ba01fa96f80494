"""What the trainer reads and writes for one job: data sets, the adapter, prompts and answers, events and log lines."""

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
from worker.protocol.mailbox import InboxReader, Json, TrainerMessage, timed

EVENT_TYPES = {JobStepped: "stepped", JobEvaluated: "evaluated", JobFinished: "finished", JobDiverged: "diverged"}


def taken(inbox: InboxReader, ranks: Ranks) -> list[TrainerMessage]:
    """What has come since, on every rank."""
    found = inbox.take() if ranks.leads else []
    messages = ranks.broadcast([[message.verb, message.body] for message in found])
    return [TrainerMessage(verb=verb, body=body) for verb, body in messages]


def datasets_of(
    job: str, train: Path | None, valid: Path | None, ranks: Ranks
) -> tuple[TokenDataset, TokenDataset | None]:
    """Its training and held-out data. Raises LoraCoreError, on every rank."""
    assert train is not None
    with ranks.together(), shortage_of(job, part="data"):
        return TokenDataset.load(train), TokenDataset.load(valid) if valid else None


def exported(
    engine: Engine, job: str, folder: Path, *, base_name: str, between: Between, amid: Between, spans: list[Json]
) -> Json | None:
    """Export a job's adapter to `folder`, and PEFT's verdict on it; of another rank than the leader None.

    between: called after each linear of the export, and amid after each of the verification. spans: what was done is
    added to it, for traces. A base that is divided computes nothing but on all ranks, so each of them exports, to a
    folder of its own; and none begins a part of it before all have done the one before. Raises LoraCoreError and
    OSError, on every rank; BrokenPass on one that ran out of memory, for which the others wait.
    """
    ranks = engine.ranks
    engine.compare_ranks(job)

    def written(place: Path) -> None:
        began_at = time.time()
        engine.export(job, place, base_name=base_name, between=between)
        spans.append(timed("export", began_at))

    def verified(place: Path) -> Json:
        from lora_core.peft_format.verify import verify_export  # brings PEFT, a second: not before the first job

        def tell() -> None:
            amid()
            failpoints.pass_by("verifying")

        began_at = time.time()
        report = asdict(verify_export(engine.base, place, between=tell))
        spans.append(timed("verify", began_at))
        return report

    if not engine.base.is_sharded:
        with ranks.together(), _blamed_on_adapter():
            if not ranks.leads:
                return None
            written(folder)
            return verified(folder)
    with ExitStack() as stack:
        with ranks.together():
            place = folder if ranks.leads else Path(stack.enter_context(TemporaryDirectory())) / "adapter"
        with ranks.together(), _blamed_on_adapter():
            written(place)
        with ranks.together(), _blamed_on_adapter():
            report = verified(place)
        return report if ranks.leads else None


@contextmanager
def _blamed_on_adapter() -> Generator[None]:
    """Whatever is wrong with one adapter is no fault of its packmates; that of a device is everybody's."""
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
    """By job, the step whose weights the row holds now: a finished job may have gone back to its best."""
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
    base_name: str
    num_steps: int
    sample_request: SampleRequest | None = None
    """What it answers at each evaluation."""
    saved_step: int
    """Step of the newest checkpoint that was reported, or of the one that the job resumed from; 0: none."""

    def is_checkpoint_due(self, step: int) -> bool:
        """The last step needs none, because the adapter is exported after it."""
        return step % self.checkpoint_every_steps == 0 and step < self.num_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One job's prompts, with what ends an answer."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    max_tokens: int
    end_ids: frozenset[int]


def sample_request(base: BaseText, samples: Samples, *, as_chat: bool) -> SampleRequest:
    """as_chat: each prompt is a user's turn in the base's template. Raises Refused where that takes none."""
    return SampleRequest(
        texts=tuple(samples.prompts),
        ids=tuple(base.prompt_ids(prompt, as_chat=as_chat) for prompt in samples.prompts),
        max_tokens=samples.max_tokens,
        end_ids=base.end_ids(as_chat=as_chat),
    )


def sample_records(base: BaseText, request: SampleRequest, answers: list[tuple[int, ...]]) -> list[Json]:
    """Prompts with answers, for people. `is_complete`: the answer has come to its end within max_tokens."""
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

    def knows(self, admit: Mapping[str, Any]) -> str:
        """The claim of a job that is to be admitted, of which lines may tell from here on."""
        claim_id = str(admit["claim_id"])
        trace = tracing.trace_id(admit.get("trace"))
        self._subjects[claim_id] = {
            "job": admit.get("job_id"), "claim": claim_id, "trainer": self._trainer_id, "trace": trace,
        }  # fmt: skip
        return claim_id

    def record_event(self, claim_id: str, event_type: str, body: Mapping[str, Any]) -> None:
        """An event of a job."""
        if not self._speaks:
            return
        error: Json | None = body.get("error")
        numbers = [f"{name}={body[name]}" for name in NUMBERS if name in body]
        code = [f"code={error['code']}"] if error is not None else []
        with logs.about(self._subjects.get(claim_id, {"claim": claim_id, "trainer": self._trainer_id})):
            log.log(logging.WARNING if error is not None else logging.INFO, " ".join([event_type, *numbers, *code]))

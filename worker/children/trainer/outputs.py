"""What the trainer's engine gives, as the trainer tells and keeps it; and what all its processes are told. Runs in the
trainer alone."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from catalog import failpoints
from lora_core.data.token_dataset import TokenDataset
from lora_core.distributed.ranks import Ranks
from lora_core.engine.engine import Engine
from lora_core.errors import BrokenPass, LoraCoreError
from lora_core.events import Event, JobDiverged, JobEvaluated, JobFinished, JobStepped
from lora_core.forward.generation import Prompts
from lora_core.forward.progress_hooks import Between
from lora_core.runtime.device_errors import shortage_of
from lora_core.runtime.device_faults import is_device_fault
from worker.children.trainer.sampling import Asked
from worker.protocol.handled import print_handled
from worker.protocol.mailbox import InboxReader, Json, Message, timed

EVENT_TYPES = {JobStepped: "stepped", JobEvaluated: "evaluated", JobFinished: "finished", JobDiverged: "diverged"}


def taken(inbox: InboxReader, ranks: Ranks) -> list[Message]:
    """What has come since, on every rank."""
    found = inbox.take() if ranks.leads else []
    told = ranks.told([[message.verb, message.body] for message in found])
    return [Message(verb=verb, body=body) for verb, body in told]


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

    if not engine.base.is_divided:
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


def prompts_of(asked: Asked) -> Prompts:
    return Prompts(prompts=asked.ids, max_tokens=asked.max_tokens, end_ids=asked.end_ids)


def as_json(event: Event) -> Json:
    body = asdict(event)
    if body.get("rewards"):
        body["rewards"] = {name: value for name, value in body["rewards"].items() if value is not None}
    return {"type": EVENT_TYPES[type(event)], "claim_id": body.pop("job"), **body}

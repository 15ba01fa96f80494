"""What the trainer's engine gives, as the trainer tells and keeps it; and what all its processes are told. Runs in the
trainer alone."""

from __future__ import annotations

import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from lora_core.between_parts import Between
from lora_core.device_faults import is_device_fault
from lora_core.distributed import Ranks
from lora_core.engine import Engine
from lora_core.errors import LoraCoreError
from lora_core.events import Event, JobDiverged, JobEvaluated, JobFinished, JobStepped
from lora_core.generate import Prompts
from worker.sampling import Asked
from worker.trainer_directory import InboxReader, Json, Message, timed

EVENT_TYPES = {JobStepped: "stepped", JobEvaluated: "evaluated", JobFinished: "finished", JobDiverged: "diverged"}


def taken(inbox: InboxReader, ranks: Ranks) -> list[Message]:
    """What has come since, on every rank."""
    found = inbox.take() if ranks.leads else []
    told = ranks.told([[message.verb, message.body] for message in found])
    return [Message(verb=verb, body=body) for verb, body in told]


def exported(
    engine: Engine, job: str, folder: Path, *, base_name: str, between: Between, spans: list[Json]
) -> Json | None:
    """Export a job's adapter to `folder`, and PEFT's verdict on it; of another rank than the leader None.

    spans: what was done is added to it, for traces. A base that is divided computes nothing but on all ranks, so each
    of them exports, to a folder of its own. Raises LoraCoreError and OSError, on every rank.
    """
    ranks = engine.ranks
    if not engine.base.is_divided:
        return ranks.by_leader(
            lambda: _verified(engine, job, folder, base_name=base_name, between=between, spans=spans)
        )
    with ranks.together():
        if ranks.leads:
            return _verified(engine, job, folder, base_name=base_name, between=between, spans=spans)
        with tempfile.TemporaryDirectory() as scratch:
            _verified(engine, job, Path(scratch) / "adapter", base_name=base_name, between=between, spans=spans)
    return None


def _verified(engine: Engine, job: str, folder: Path, *, base_name: str, between: Between, spans: list[Json]) -> Json:
    from lora_core.verify import unverifiable, verify_export  # brings PEFT, a second: not before the first job

    try:
        began_at = time.time()
        engine.export(job, folder, base_name=base_name, between=between)
        spans.append(timed("export", began_at))
        began_at = time.time()
        report = asdict(verify_export(engine.base, folder, between=between))
        spans.append(timed("verify", began_at))
        return report
    except (LoraCoreError, OSError):
        raise
    except Exception as error:  # whatever is wrong with one adapter is no fault of its packmates
        if is_device_fault(error):
            raise
        traceback.print_exc()
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

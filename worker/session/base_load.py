"""How a trainer of this worker holds a base model, by catalog/resources/sharding.py, and the task to load one that
inference requests wait for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from catalog.error_texts import ErrorText
from catalog.errors import LorryError, StaleClaim
from catalog.inference import engines
from catalog.registry import base_models
from catalog.resources import requirements
from catalog.resources.memory import BaseModelMemory
from catalog.resources.pack_key import precision_of, quantization_of
from catalog.resources.sharding import Demand, Strategy, block_bytes, hindrance, reason
from catalog.tables.jobs import Job
from catalog.tasks import outcomes, task_queue
from catalog.tasks.task_queue import TaskClaim
from worker.context.context import WorkerContext

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseToLoad:
    """A base model that is loaded because requests wait for it. A trainer for jobs has these attributes of its first
    job."""

    trainer_id: str
    base_model: str
    base_digest: str
    pack_key: str


def strategy_for(context: WorkerContext, job: Job | BaseToLoad) -> Strategy:
    """Return how a trainer on this worker holds the base model for such a job and all its packmates, or for inference
    requests."""
    demand = _demand(context, job) if isinstance(job, Job) else base_demand(context, job)
    return context.group.strategy(demand)


def reason_for(context: WorkerContext, job: Job) -> str:
    """Return the reason for this strategy, for users."""
    return reason(context.group, _demand(context, job))


def base_demand(context: WorkerContext, base: BaseToLoad) -> Demand:
    """Return the memory that a trainer without jobs needs."""
    description = base_models.get(context.db, base.base_model).description or {}
    precision, quantization = precision_of(base.pack_key), quantization_of(base.pack_key)
    can_shard = hindrance({}, quantization, description) is None
    shardable_bytes, gathered_bytes = block_bytes(description, precision) if can_shard else (0, 0)
    return Demand(
        whole_bytes=BaseModelMemory(description, precision, quantization).trainer_bytes(),
        shardable_bytes=shardable_bytes,
        gathered_bytes=gathered_bytes,
    )


def _demand(context: WorkerContext, job: Job) -> Demand:
    return requirements.demand(job, recomputes=context.device.recomputes)


class BaseLoad:
    """A claimed task. It ends once, by one of the methods; the others then do nothing."""

    def __init__(self, context: WorkerContext, claimed: TaskClaim) -> None:
        self._context, self._claimed = context, claimed
        self._is_over = False
        context.heartbeat.renewals.append(self._renew)

    def succeed(self) -> None:
        self._end(lambda: engines.note_loaded(self._context.db, self._claimed))

    def fail(self, error: ErrorText) -> None:
        """Fail the requests that wait."""
        self._end(lambda: outcomes.fail(self._context.db, self._claimed, engines.LOAD, error))

    def retry(self) -> None:
        """Let a worker try again: the load has failed, and the base model may be the cause."""
        self._end(lambda: outcomes.retry(self._context.db, self._claimed, engines.LOAD, engines.LOAD_FAILED))

    def give_back(self) -> None:
        """Let another worker load it. The attempt does not count."""
        self._end(lambda: task_queue.release(self._context.db, self._claimed))

    def _renew(self) -> None:
        """The heartbeat's thread calls it. A load whose task was lost continues, because its trainer can
        answer requests."""
        task_queue.renew(self._context.db, self._claimed, lease_seconds=self._context.settings.lease_seconds)

    def _end(self, act: Callable[[], None]) -> None:
        if self._is_over:
            return
        self._is_over = True
        with suppress(ValueError):  # the heartbeat has ended
            self._context.heartbeat.renewals.remove(self._renew)
        try:
            act()
        except (LorryError, StaleClaim) as error:  # its lease expires
            log.warning("Not recorded: %s", error)

"""Memory of one trainer in bytes: what it uses, by its reports, and what it has yet to allocate, by estimates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from catalog.resources import requirements
from catalog.resources.memory import JOB_TOKENS, BaseModelMemory, tick_tokens, widens_tick
from catalog.resources.pack_key import precision_of, quantization_of
from catalog.resources.sharding import Demand, ShardingStrategy, block_bytes
from catalog.tables.table import Json
from worker.context.context import WorkerContext
from worker.node import devices
from worker.session.session_job import SessionJob


class MemoryLedger:
    """The memory of one trainer on this worker."""

    def __init__(
        self,
        context: WorkerContext,
        description: Json,
        pack_key: str,
        *,
        holding: ShardingStrategy,
        jobs: Mapping[str, SessionJob],
    ) -> None:
        """description: of the base model. holding: how the devices hold it. jobs: of the trainer, by claim."""
        self._base = BaseModelMemory(description, precision_of(pack_key), quantization_of(pack_key))
        self._context = context
        self._holding: ShardingStrategy = holding
        self._jobs = jobs
        self._loaded_bytes: int | None = None
        """The memory of the base model that the trainer reported when it was ready. None before."""
        self.report: Json = {}
        """The trainer's last report of its memory."""

    def ready(self, event: Json) -> None:
        """Take over the trainer's `ready` event. From then on its own kernels are assumed for all estimates."""
        self.report = event["memory"]
        self._loaded_bytes = int(self.report["base_bytes"])
        self._base = replace(self._base, kernels=event.get("elementwise_kernels"))

    def to_come(self) -> int:
        """Return the memory that the trainer has yet to allocate for its jobs.

        Until it has admitted its first job, this includes the base model and the first tick. For each further job, it
        includes the slice by which the tick grows.
        """
        pending = [job for job in self._jobs.values() if not job.is_admitted]
        num_admitted = len(self._jobs) - len(pending)
        return self._bytes_of(pending, num_others=num_admitted) + (0 if num_admitted else self._trainer_to_come())

    def predicted(self) -> int:
        """Return the memory of the trainer with all its jobs, as estimated for their admission."""
        return self._bytes_of(self._jobs.values(), num_others=0) + self._trainer_bytes()

    def in_use(self) -> int:
        """Return the memory that unloading the trainer would free, by its last report. A GPU's allocator keeps the
        memory of its largest tick. A CPU's allocator returns most of it."""
        whole = int(self.report.get("base_bytes", 0)) + int(self.report.get("adapter_bytes", 0))
        return max(whole, int(self.report.get("peak_bytes", 0))) if self._context.device.kind == "cuda" else whole

    def spare(self) -> int:
        """Return the memory that torch keeps on the GPU beyond the ticks of the admitted jobs, as estimated. Ticks
        use it while no other job needs it, and later activations are recomputed instead, but not LoRA's products."""
        admitted = [job for job in self._jobs.values() if job.is_admitted]
        num_slices = sum(map(self._widens_tick, range(len(admitted))))
        counted = self._base.tick_bytes(JOB_TOKENS) + num_slices * self.slice_bytes()
        products = sorted((self._own_parts(job)["lora_products"] for job in admitted), reverse=True)
        counted += sum(products[: 1 + num_slices])  # a tick has no slices of further jobs
        return max(0, int(self.report.get("cached_bytes", 0)) - counted)

    def slice_bytes(self) -> int:
        """Return the activations that one more job adds to its tick."""
        return self._base.slice_bytes()

    def _bytes_of(self, jobs: Collection[SessionJob], *, num_others: int) -> int:
        """Return the memory of these jobs and of the slices by which they widen the tick, given the number of other
        jobs in the trainer."""
        own = sum(sum(self._own_parts(job).values()) for job in jobs)
        num_slices = sum(map(self._widens_tick, range(num_others, num_others + len(jobs))))
        return own + num_slices * self.slice_bytes()

    def _own_parts(self, job: SessionJob) -> dict[str, int]:
        return requirements.own_parts(job.claim.job, self._base, recomputes=self._context.device.recomputes)

    def _widens_tick(self, num_before: int) -> bool:
        limit = tick_tokens(self._context.device.kind, num_lanes=devices.num_threads())
        return widens_tick(num_before, tick_tokens=limit)

    def _trainer_to_come(self) -> int:
        """Return the memory that the base model and the first tick still need, before any job is admitted. A trainer
        that is ready and empty needs none."""
        if self._loaded_bytes is None:
            return self._trainer_bytes() + self._context.group.reserve_bytes
        return max(0, self._trainer_bytes() - self._loaded_bytes) if self._jobs else 0

    def _trainer_bytes(self) -> int:
        whole = self._base.trainer_bytes()
        if self._holding == "replicated":
            return whole
        divisible, gathered = block_bytes(self._base.description, self._base.precision)
        demand = Demand(whole_bytes=whole, shardable_bytes=divisible, gathered_bytes=gathered)
        return self._context.group.allocated_bytes(demand, self._holding)

# pyright: basic
"""The engine: jobs join and leave one loaded base model between ticks.

A tick is one forward and backward pass (for an evaluation, a forward pass) over slices of several jobs.

    >>> from lora_core.base_model.model import load_base
    >>> from lora_core.config import LoraConfig, OptimizerConfig, ScheduleConfig
    >>> engine = Engine(load_base("base", dtype="float32", device="cpu"), EngineConfig(token_budget=4096))
    >>> config = JobConfig(lora=LoraConfig(rank=8, alpha=16), optimizer=OptimizerConfig(learning_rate=1e-3),
    ...     schedule=ScheduleConfig(kind="constant", num_steps=3), batch_size=2, num_steps=3, seed=0)
    >>> for name in ("first", "second"):
    ...     engine.admit(name, config, TokenDataset.load(Path(f"{name}.safetensors")))
    >>> while not engine.idle:
    ...     print([f"{type(event).__name__} {event.job} {event.step}" for event in engine.tick()])
    ['JobStepped first 1', 'JobStepped second 1']
    ['JobStepped first 2', 'JobStepped second 2']
    ['JobStepped first 3', 'JobFinished first 3', 'JobStepped second 3', 'JobFinished second 3']
    >>> report = engine.export("first", Path("adapter"), base_name="base")
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.adapter.optimizer import StepSizes
from lora_core.base_model.model import BaseModel
from lora_core.config import JobConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine.checkpoint import CheckpointSnapshot, take_snapshot
from lora_core.engine.fair_queue import ReadySlice, select_slices, widen
from lora_core.engine.invariance_probe import Invariance, measure_invariance
from lora_core.engine.job import TrainingJob
from lora_core.engine.job_start import empty_adapter, job_on, load_adapter
from lora_core.engine.joint_steps import measure_together, step_together
from lora_core.engine.memory_recovery import MemoryRecovery
from lora_core.engine.rank_agreement import (
    StepOutcome,
    agree,
    continue_start,
    read_sizes,
    require_equal_weights,
)
from lora_core.engine.step import Computed, Passes, TickPlan
from lora_core.engine.throughput import Throughput
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadCheckpoint, ConfigError, LoraCoreError, OutOfMemory
from lora_core.events import Event
from lora_core.forward.continuous_batch import ContinuousBatch, Prompt
from lora_core.forward.generation import Generation, Prompts
from lora_core.forward.progress_hooks import Between, calling_at_linears, silent
from lora_core.kernels.gpu.comparison import agree as agree_on_kernels
from lora_core.kernels.selection import prepare_device
from lora_core.layers.activation_checkpointing import ActivationMemory
from lora_core.losses.preference import SliceScores
from lora_core.peft_format.export import AdapterSnapshot, ExportReport, export_adapter, take_adapter_snapshot
from lora_core.runtime.cpu_lanes import Lanes
from lora_core.runtime.device_errors import interrupts_wait, shortage_in_pass, shortage_of

START_WORK = 2**30
"""Multiplications of a job's initialization in one tick, a fraction of a second on one core. At least one weight is
initialized per tick."""


class Engine:
    """Trains every admitted job on `base`. Not thread-safe.

    A job that fails is quarantined: it computes nothing more, keeps its weights, and waits to be evicted. The other
    jobs continue.
    """

    def __init__(self, base: BaseModel, config: EngineConfig, ranks: Ranks = ALONE) -> None:
        """Attach to `base` and measure batch invariance. Raises UnsupportedModel and torch.OutOfMemoryError.

        `ranks` are the processes that train together. Each has an engine, and calls its methods in the same order with
        the same arguments (lora_core/distributed/ranks.py).
        """
        if base.is_sharded:  # every rank must pass through all blocks at the same time: no lanes
            config = replace(config, num_lanes=1)
        self.base = base
        self.config = config
        self.ranks = ranks
        self._jobs: dict[str, TrainingJob] = {}
        self._in_tick: list[TrainingJob] = []
        self._errors: list[OutOfMemory] = []
        """Errors of quarantined jobs. `tick` raises one per call."""
        self.throughput = Throughput()
        self._lanes = Lanes(config.num_lanes)
        if base.device.startswith("cuda"):
            prepare_device(base.model.device)  # before the first launch, which Triton makes to the current device
            agree_on_kernels(base.model.device, ranks.gathered)
        attachment = base.attach(batch_invariant=config.batch_invariant)
        with ranks.sharing_errors(), shortage_in_pass(is_sharded=base.is_sharded):
            invariance = measure_invariance(base, self._lanes)
        is_bitwise = set(ranks.gathered(invariance)) == {"bitwise"}
        self.invariance: Invariance = "bitwise" if is_bitwise else "allclose"
        self.activations = ActivationMemory(
            attachment.linears,
            device=base.device,
            item_bytes=base.dtype.itemsize,
            mode=config.checkpoint_blocks,
            is_compiled=self.elementwise_kernels == "cuda",
        )
        self._memory = MemoryRecovery(self.activations, token_budget=config.token_budget, num_ranks=ranks.size)
        agree(ranks, [], self.activations)
        self._passes = Passes(base, lanes=self._lanes, ranks=ranks)

    def admit(
        self,
        job: str,
        config: JobConfig,
        train: TokenDataset,
        valid: TokenDataset | None = None,
        resume_from: Path | str | None = None,
        *,
        parent: Path | str | None = None,
        shortages: int = 0,
    ) -> None:
        """Load `job`. It trains once its adapter is initialized.

        Initialization takes up to START_WORK multiplications here and continues in later ticks, so that packmates do
        not wait for it.

        Args:
            train, valid: Training and validation set.
            resume_from: Folder of a checkpoint.
            parent: Folder of the adapter whose weights the job starts with, which is also the reference of a preference
                objective (load_parent.py). It must be the same one if the job resumes.
            shortages: Number of earlier attempts of the job that ran out of memory. Ticks are smaller while it is
                loaded.

        Raises:
            ConfigError: A job of this name is loaded, the job needs a validation set and has none, or the adapter of
                `parent` has another shape.
            NoTargets, BadDataset, BadParent, BadCheckpoint, OutOfMemory: See these classes.

        If it raises, the engine is unchanged.
        """
        if job in self._jobs:
            raise ConfigError(
                f"Job {job!r} is already loaded.", remedy="Give the job another name, or evict the loaded one first."
            )
        with self.ranks.sharing_errors():
            admitted = job_on(
                self.base, job, config, train, valid, resume_from=resume_from, parent=parent, ranks=self.ranks
            )
        continue_start(self.ranks, admitted, START_WORK)
        admitted.served, admitted.shortages = self._least_served(), shortages
        self._jobs[job] = admitted
        self.activations.expect()

    def tick(self) -> list[Event]:
        """Compute one tick. Returns the events of the steps and evaluations that it completed; [] without work.

        Raises OutOfMemory for one job, which is then quarantined; the next tick continues with the others. Raises
        RanksDiffer and BrokenPass, after which the engine must be discarded. Any other exception, including
        KeyboardInterrupt, leaves the jobs as they were after their last completed step.
        """
        try:
            self._discard_unfinished()  # 1. Jobs of an interrupted tick restart their step or evaluation.
            if not self._errors:
                self._continue_start()  # 2. A new job initializes a part of its adapter.
                plan = self._plan()  # 3. The leader selects slices, and the rank that computes each. None: no work.
                computed = self._compute(plan) if plan else None  # 4. Forward and backward. None: out of memory.
                if plan and computed:
                    outcomes = self._update(plan, computed)  # 5. Each job whose batch is complete takes its step.
                    self._agree(outcomes)  # 6. The ranks compare their outcomes.
        except BaseException:
            self._discard_unfinished()
            raise
        if self._errors:
            raise self._errors.pop(0)
        return self._take_events()

    def evict(self, job: str) -> None:
        """Unload a job and free its memory. After the last job, the memory that torch caches on a GPU is freed too."""
        del self._jobs[job]
        self._errors = [error for error in self._errors if error.job != job]
        self._memory.forget()
        if not self._jobs and self.base.device.startswith("cuda"):
            torch.cuda.empty_cache()  # the driver counts torch's cache as used, so no other process could allocate it

    # The steps of a tick

    def _discard_unfinished(self) -> None:
        # A job leaves the list only after its replay: an interrupt may arrive here, and the next tick then continues.
        self._lanes.wait()
        while self._in_tick:
            self._in_tick[-1].replay_unit()
            self._in_tick.pop()

    def _continue_start(self) -> None:
        """Continue the initialization of the job that was admitted first among those not yet initialized."""
        job = next((job for job in self._jobs.values() if job.starting is not None), None)
        if job is None:
            return
        job.served = self._least_served()
        try:
            continue_start(self.ranks, job, START_WORK)
        except LoraCoreError as error:
            job.quarantine()
            raise OutOfMemory(job.name, part="start") from error

    def _plan(self) -> TickPlan | None:
        """Return the leader's plan on every rank. It depends on times and free memory, which differ between ranks."""
        waiting = [
            ReadySlice(job=name, kind=job.unit.kind, num_tokens=tokens[0], served=job.served, further=tokens[1:])
            for name, job in self._jobs.items()
            if job.starting is None and job.unit is not None and (tokens := job.waiting_tokens())
        ]
        if not waiting:
            return None
        return TickPlan.of_json(self.ranks.broadcast(self._own_plan(waiting).as_json() if self.ranks.leads else None))

    def _own_plan(self, waiting: list[ReadySlice]) -> TickPlan:
        shortages = max(job.shortages for job in self._jobs.values())
        max_tokens = self._max_tokens(waiting, shortages)
        selected, tokens = self._widened(select_slices(waiting, token_budget=max_tokens), max_tokens)
        plan = TickPlan(
            kind=selected[0].kind,
            tokens={ready.job: own for ready, own in zip(selected, tokens, strict=True)},
            ranks=tuple(self.ranks.shared_out(list(chain(*tokens)), short=self._memory.short_ranks)),
        )
        recomputes = plan.kind == "train" and self.activations.checkpoints(plan.largest_share, is_short=shortages > 0)
        return replace(plan, checkpointed=recomputes)

    def _max_tokens(self, waiting: list[ReadySlice], shortages: int) -> int:
        """Return the maximum number of tokens of a tick, limited by memory and by `max_tick_seconds`.

        A tick takes as long as its fullest lane. A slice is never split, so each lane may have as many tokens as the
        largest waiting slice, be it a job's next or a further one of its step.
        """
        rate = self.throughput.lane_tokens_per_second
        lane_tokens = int(rate * self.config.max_tick_seconds) or self._memory.max_tokens
        num_lanes = self.config.num_lanes * self.ranks.size
        sizes = chain.from_iterable((ready.num_tokens, *ready.further) for ready in waiting)
        largest_slice = max(sizes) if num_lanes > 1 else 0
        return min(self._memory.tokens_after(shortages), num_lanes * max(lane_tokens, largest_slice))

    def _widened(self, selected: list[ReadySlice], max_tokens: int) -> tuple[list[ReadySlice], list[tuple[int, ...]]]:
        """Return the jobs of the tick and the tokens of each one's slices.

        Only the first job is chosen until enough ticks of its size (`ticks_alone`) have measured its speed alone.
        """
        job_tokens = self.ranks.size * self.config.job_tokens
        job_slices = math.inf if self.config.job_slices is None else self.ranks.size * self.config.job_slices
        first = widen(selected[:1], token_budget=max_tokens, job_tokens=job_tokens, job_slices=job_slices)
        if selected[0].kind == "train" and self.throughput.num_alone(sum(first[0])) < self.config.ticks_alone:
            return selected[:1], first
        return selected, widen(selected, token_budget=max_tokens, job_tokens=job_tokens, job_slices=job_slices)

    def _compute(self, plan: TickPlan) -> Computed | None:
        """Run the passes. Gradients stay with the slices until `_update` adds them up.

        Returns None if memory ran out and the next tick is adapted. Raises OutOfMemory if a single slice fits on no
        rank.
        """
        self._in_tick = [self._jobs[name] for name in plan.tokens]
        started = time.perf_counter()
        own_tokens = plan.share_of(self.ranks.rank)
        try:
            with self.activations.observed(own_tokens, kind=plan.kind, checkpointed=plan.checkpointed):
                computed = self._passes.run(plan, self._jobs)
        except torch.OutOfMemoryError as error:
            if not self._memory.recover(plan):
                job = self._in_tick[0]
                job.quarantine()
                raise OutOfMemory(job.name, num_tokens=plan.num_tokens) from error
            self._discard_unfinished()
            return None
        self._memory.grow()
        if plan.kind == "train":
            self.throughput.record(
                num_tokens=plan.num_tokens,
                fullest_lane=computed.fullest_lane,
                num_jobs=len(plan.tokens),
                seconds=time.perf_counter() - started,
            )
        return computed

    def _update(self, plan: TickPlan, computed: Computed) -> list[StepOutcome]:
        """Pass gradients and scores to the jobs. The host reads the sizes of all steps that are due in one copy."""
        outcomes: list[StepOutcome] = []
        for job, numbers in zip(self._in_tick, plan.by_job().values(), strict=True):
            job.served += sum(plan.sizes[number] for number in numbers)
            outcome = StepOutcome(job=job, step=job.step, num_pending=len(job.pending))
            outcomes.append(outcome)
            with interrupts_wait():  # the sum of the gradients would be incomplete
                job.collect([plan.ranks[number] for number in numbers])
                self._receive(outcome, [computed.scores[number] for number in numbers])
        if plan.kind == "train":
            measure_together(outcomes)
            read = zip(outcomes, read_sizes(self.ranks, outcomes), strict=True)
            due = [(outcome, sizes) for outcome, sizes in read if sizes is not None]
            # A half-applied optimizer step can be neither undone nor completed.
            with interrupts_wait():
                step_together([(outcome, sizes) for outcome, sizes in due if outcome.job.has_joint_step])
            for outcome, sizes in due:
                if not outcome.job.has_joint_step:
                    with interrupts_wait():
                        self._step(outcome, sizes)
        return outcomes

    def _receive(self, outcome: StepOutcome, scores: list[SliceScores]) -> None:
        """Pass the scores of its slices to the job, in order. After divergence the remaining ones are dropped.

        Events stay with the job, so that none is lost if another job of the tick fails.
        """
        job = outcome.job
        try:
            with shortage_of(job.name):
                for score in scores:
                    job.pending += job.receive(score) if job.unit is not None else []
        except OutOfMemory as error:
            outcome.error = error

    def _step(self, outcome: StepOutcome, sizes: StepSizes) -> None:
        try:
            with shortage_of(outcome.job.name):
                outcome.job.pending += outcome.job.finish_step(sizes)
        except OutOfMemory as error:
            outcome.error = error

    def _agree(self, outcomes: list[StepOutcome]) -> None:
        with interrupts_wait():  # a rank that left the exchange early would block the others
            self._errors += agree(self.ranks, outcomes, self.activations)
        self._in_tick = []

    def _take_events(self) -> list[Event]:
        events: list[Event] = []
        for job in self._jobs.values():
            events += job.pending
            job.pending = []
        return events

    def _least_served(self) -> int:
        """Return the initial token count of a new job, so that it neither starves the others nor waits for them."""
        return min((job.served for job in self._jobs.values() if job.starting is None), default=0)

    # Outputs from a job's weights

    def save_checkpoint(self, job: str, directory: Path) -> None:
        """Write the state after the last completed step into a new directory (checkpoint.py).

        Raises ConfigError, BadCheckpoint, OutOfMemory and OSError.
        """
        started = self._started(job)
        with shortage_of(job, part="snapshot"):
            take_snapshot(started, self.base).write(directory)

    def checkpoint_snapshot(self, job: str) -> CheckpointSnapshot:
        """Return the state after the last completed step, from which another thread can write the checkpoint.

        The job may be ticked and evicted before that. On a GPU the host does not wait for the device. Raises
        ConfigError, BadCheckpoint and OutOfMemory.
        """
        started = self._started(job)
        with shortage_of(job, part="snapshot"):
            return take_snapshot(started, self.base).lasting()

    def adapter_snapshot(self, job: str, *, base_name: str, base_revision: str | None = None) -> AdapterSnapshot:
        """Like `checkpoint_snapshot`, for the files of an export without evidence. See `export`."""
        adapter = self._started(job).adapter
        with shortage_of(job, part="snapshot"):
            taken = take_adapter_snapshot(self.base, adapter, base_name=base_name, base_revision=base_revision)
            return taken.lasting()

    def export(
        self,
        job: str,
        directory: Path,
        *,
        base_name: str,
        base_revision: str | None = None,
        between: Between = silent,
        has_evidence: bool = True,
    ) -> ExportReport:
        """Write the adapter in PEFT's layout into a new directory.

        It holds the weights after the last completed step, or for a finished job the ones to keep (`JobConfig.keep`).

        Args:
            base_name: Value of `base_model_name_or_path` in adapter_config.json.
            base_revision: Value of `revision` there: the commit of a base model on the Hub.
            between: Called after each linear of the evidence passes, for example to send a heartbeat.
            has_evidence: Compute two more passes for logits that verify.py compares with PEFT's.

        Raises:
            ConfigError, BadCheckpoint, OutOfMemory, OSError: See these classes.
        """
        in_passes = shortage_in_pass(is_sharded=self.base.is_sharded and has_evidence)
        with in_passes, shortage_of(job), calling_at_linears(self.base, between):
            adapter = self._started(job).adapter
            return export_adapter(
                self.base,
                adapter,
                directory,
                base_name=base_name,
                base_revision=base_revision,
                has_evidence=has_evidence,
            )

    def generation(self, prompts: Mapping[str, Prompts]) -> Generation:
        """Return a generator of greedy answers to each job's prompts with its current weights.

        None of these jobs may be ticked before the answers are complete. Training is not affected. Raises ConfigError,
        BadCheckpoint and OutOfMemory.
        """
        rows = {job: (self.adapter(job), own) for job, own in prompts.items()}
        return Generation(
            self.base,
            rows,
            lanes=self._lanes,
            token_budget=self.config.token_budget,
            is_exact=self.invariance == "bitwise",
        )

    def adapter(self, job: str) -> FlatAdapter:
        """Return the adapter with the job's current weights. The job must not be ticked while answers use it.

        Raises ConfigError, BadCheckpoint and OutOfMemory.
        """
        return self._started(job).adapter

    def load_adapter(self, directory: Path) -> FlatAdapter:
        """Load an adapter in PEFT's layout for inference. It belongs to no job.

        Raises BadParent, NoTargets and ConfigError if it does not fit the base model, and OutOfMemory.
        """
        with shortage_of(directory.name):
            return load_adapter(self.base, directory)

    def continuous_batch(self, *, cache_bytes: int) -> ContinuousBatch:
        """Return an empty batch for inference, whose key-value cache takes at most `cache_bytes`.

        Jobs may be ticked between two of its passes. A sharded base model needs the same calls on all ranks. Raises
        OutOfMemory.
        """
        trial = self._batch(cache_tokens=1)
        trial.add(Prompt(name="trial", adapter=self.no_adapter(), ids=(0,), max_tokens=2))
        trial.advance()
        return self._batch(cache_tokens=max(1, cache_bytes // max(1, trial.cache_bytes_per_token)))

    def _batch(self, *, cache_tokens: int) -> ContinuousBatch:
        return ContinuousBatch(
            self.base,
            lanes=self._lanes,
            cache_tokens=cache_tokens,
            prompt_tokens=self.config.token_budget,
            is_exact=self.invariance == "bitwise",
        )

    def free_bytes(self, *, host_bytes: int) -> int:
        """Return the free memory of the device. For a CPU that is `host_bytes`, which only the caller can determine."""
        device = self.base.device
        if not device.startswith("cuda"):
            return host_bytes
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached

    def no_adapter(self) -> FlatAdapter:
        """Return an adapter without layers, with which the base model answers unchanged."""
        return empty_adapter(self.base)

    def compare_ranks(self, job: str) -> None:
        """Raise RanksDiffer on all ranks if their weights of the job differ. Completes its initialization first.

        Call it before the weights are exported, saved or reported. Raises OutOfMemory.
        """
        while self._jobs[job].starting is not None:
            continue_start(self.ranks, self._jobs[job], START_WORK)
        require_equal_weights(self.ranks, self._jobs[job])

    def _started(self, name: str) -> TrainingJob:
        """Return an initialized job. Raises ConfigError if it is not loaded, and BadCheckpoint if its update failed."""
        if name not in self._jobs:
            raise ConfigError(
                f"Job {name!r} is not loaded.",
                remedy=f"Use one of: {', '.join(self._jobs)}." if self._jobs else "Load it first: no job is loaded.",
            )
        job = self._jobs[name]
        if job.is_torn:
            raise BadCheckpoint(
                f"Job {name!r} has undefined weights, because an optimizer update failed before it was complete.",
                remedy="Evict the job, and resume it from an earlier checkpoint.",
            )
        with shortage_of(name, part="start"):
            while job.starting is not None:
                job.continue_initialization(START_WORK)
        return job

    # Reports

    @property
    def idle(self) -> bool:
        """Whether no job has a slice to compute, and no event or error is pending."""
        return not self._errors and all(job.unit is None and not job.pending for job in self._jobs.values())

    def jobs(self) -> tuple[str, ...]:
        """Return the names of all loaded jobs, in the order of admission."""
        return tuple(self._jobs)

    def job(self, job: str) -> TrainingJob:
        """Return a loaded job: its adapter, progress, evaluated step and bytes. Only the engine may change it."""
        return self._jobs[job]

    def progress(self, job: str) -> tuple[int, int]:
        """Return (completed steps, total steps)."""
        return self._jobs[job].step, self._jobs[job].config.num_steps

    @property
    def elementwise_kernels(self) -> Literal["cpu", "cuda", "torch"]:
        """Return whose kernels compute norms and gated activations: a CPU's, a GPU's, or torch's single operations.

        Single operations on a GPU keep twice as much for the backward. The answer is "torch" if they compute any norm
        or gated MLP: those of a sharded base, and those that no kernel replaces (Attachment.is_compiled).
        """
        if not self.base.device.startswith("cuda"):
            return "cpu"
        attachment = self.base.attachment
        return "cuda" if attachment is not None and attachment.is_compiled else "torch"

    def memory(self) -> dict[str, int]:
        """Return the bytes of the base model and of all jobs, and the peak of the device (on a CPU, the process)."""
        return {
            "base_bytes": self.base.num_bytes,
            "adapter_bytes": sum(job.num_bytes for job in self._jobs.values()),
            "peak_bytes": self.activations.peak_bytes(),
        }

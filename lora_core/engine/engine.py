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

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from lora_core.base_model.model import BaseModel
from lora_core.config import JobConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine import checkpoint
from lora_core.engine.cpu_lanes import Lanes
from lora_core.engine.fair_queue import ReadySlice, select_slices, widen
from lora_core.engine.invariance_probe import Invariance, measure_invariance
from lora_core.engine.job import TrainingJob
from lora_core.engine.job_start import job_on
from lora_core.engine.memory_recovery import MemoryRecovery
from lora_core.engine.prefix_cache import PrefixCounts, Prefixes
from lora_core.engine.rank_agreement import StepOutcome, agree, require_equal_weights
from lora_core.engine.step import Computed, Passes, TickPlan
from lora_core.engine.throughput import PackSize, Throughput
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadCheckpoint, ConfigError, LoraCoreError, OutOfMemory
from lora_core.events import Event
from lora_core.forward.generation import Generation, Prompts
from lora_core.forward.progress_hooks import Between, calling_at_linears, silent
from lora_core.layers.activation_checkpointing import ActivationMemory
from lora_core.losses.preference import SliceScores
from lora_core.peft_format.export import ExportReport, export_adapter
from lora_core.runtime.device_errors import interrupts_wait, shortage_in_pass, shortage_of

START_WORK = 2**30
"""Multiplications of a job's start in one tick: a fraction of a second on one core. A start computes at least one
weight per tick."""


class Engine:
    """Trains every admitted job on `base`. Not thread-safe.

    A job that fails is quarantined: it computes nothing more, keeps its weights, and waits to be evicted. The other
    jobs continue.
    """

    def __init__(self, base: BaseModel, config: EngineConfig, ranks: Ranks = ALONE) -> None:
        """`ranks`: the processes that train together. Each has an engine, and calls its methods in the same order with
        the same arguments (lora_core/distributed/ranks.py)."""
        if base.is_sharded:  # every rank must pass through all blocks at the same time: no lanes, no skipped blocks
            config = replace(config, num_lanes=1, prefix_memory_bytes=0, prefix_disk_bytes=0)
        self.base = base
        self.config = config
        self.ranks = ranks
        self._jobs: dict[str, TrainingJob] = {}
        self._in_tick: list[TrainingJob] = []
        self._errors: list[OutOfMemory] = []
        """Of quarantined jobs; `tick` raises one per call."""
        self._throughput = Throughput()
        self._lanes = Lanes(config.num_lanes)
        attachment = base.attach(batch_invariant=config.batch_invariant)
        with ranks.together(), shortage_in_pass(is_sharded=base.is_sharded):
            invariance = measure_invariance(base, self._lanes)
        is_bitwise = set(ranks.gathered(invariance)) == {"bitwise"}
        self.invariance: Invariance = "bitwise" if is_bitwise else "allclose"
        self.activations = ActivationMemory(
            attachment.linears,
            device=base.device,
            item_bytes=base.dtype.itemsize,
            mode=config.checkpoint_blocks,
        )
        self._memory = MemoryRecovery(self.activations, token_budget=config.token_budget, num_ranks=ranks.size)
        agree(ranks, [], self.activations)
        self._prefixes = Prefixes(base, config, invariance=self.invariance)
        self._passes = Passes(base, prefixes=self._prefixes, lanes=self._lanes, ranks=ranks)

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
        """Load `job`. Its start (filling the adapter) takes up to START_WORK here and continues in later ticks, so that
        its packmates do not wait for it. The job trains once it has started.

        `resume_from`: the folder of a checkpoint. `parent`: the folder of an adapter whose weights the job begins with,
        and with which a preference objective compares (load_parent.py); the same one where the job resumes.
        `shortages`: the number of its earlier attempts that ran out of memory: ticks with it are smaller.

        Raises ConfigError (a job of this name is loaded, the job needs a held-out set and has none, or the adapter of
        `parent` has another shape), NoTargets, BadDataset, BadParent, BadCheckpoint, OutOfMemory. Then nothing has
        changed.
        """
        if job in self._jobs:
            raise ConfigError(
                f"A job {job!r} is resident already.", remedy="Give the job another name, or evict that one first."
            )
        with self.ranks.together():
            admitted = job_on(
                self.base, job, config, train, valid, resume_from=resume_from, parent=parent, ranks=self.ranks
            )
            with shortage_of(job):
                admitted.entry_block = self._prefixes.entry_block(admitted.adapter)
            with shortage_of(job, part="start"):
                admitted.go_on_starting(START_WORK)
        admitted.served, admitted.shortages = self._least_served(), shortages
        self._jobs[job] = admitted

    def tick(self) -> list[Event]:
        """Compute one tick. Returns the events of the steps and evaluations that it completed; [] without work.

        Raises OutOfMemory for one job, which is now quarantined; the next tick continues with the others. Raises
        RanksDiffer and BrokenPass, after which the engine is of no more use. Any other exception, also
        KeyboardInterrupt, leaves the jobs as they were after their last completed step.
        """
        try:
            self._discard_unfinished()  # 1. Jobs of an interrupted tick begin their step or evaluation again.
            if not self._errors:
                self._continue_start()  # 2. A new job fills its adapter, a part in each tick.
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
        """Unload a job. Its memory is free at once; after the last job, memory that torch keeps on a GPU is too."""
        del self._jobs[job]
        self._prefixes.leave(job)
        self._errors = [error for error in self._errors if error.job != job]
        assert self.base.attachment is not None
        self.base.attachment.segment_op.forget()
        self._memory.forget()
        if not self._jobs and self.base.device.startswith("cuda"):
            torch.cuda.empty_cache()  # else the driver counts torch's cache as used, and no other process can have it

    # The steps of a tick

    def _discard_unfinished(self) -> None:
        # A job leaves the list after its replay, because an interrupt may also come here: the next tick goes on.
        self._lanes.settle()
        while self._in_tick:
            self._in_tick[-1].replay_unit()
            self._in_tick.pop()

    def _continue_start(self) -> None:
        """For the job that was admitted first, of those that have not started."""
        job = next((job for job in self._jobs.values() if job.starting is not None), None)
        if job is None:
            return
        job.served = self._least_served()
        try:
            with self.ranks.together(), shortage_of(job.name, part="start"):
                job.go_on_starting(START_WORK)
        except LoraCoreError as error:
            job.quarantine()
            raise OutOfMemory(job.name, part="start") from error

    def _plan(self) -> TickPlan | None:
        """The leader's plan on every rank, since it depends on times and free memory, which differ between ranks."""
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
        """The most tokens of a tick, by memory and by `max_tick_seconds`.

        A tick lasts as long as its fullest lane. One slice is never divided, so each lane may have as many tokens as
        the largest slice that waits. The prefix cache is not considered: a tick that uses it takes less time.
        """
        rate = self._throughput.lane_tokens_per_second
        lane_tokens = int(rate * self.config.max_tick_seconds) or self._memory.max_tokens
        num_lanes = self.config.num_lanes * self.ranks.size
        largest_slice = max(ready.num_tokens for ready in waiting) if num_lanes > 1 else 0
        return min(self._memory.tokens_after(shortages), num_lanes * max(lane_tokens, largest_slice))

    def _widened(self, selected: list[ReadySlice], max_tokens: int) -> tuple[list[ReadySlice], list[tuple[int, ...]]]:
        """The jobs of the tick, and the tokens of each one's slices. Only the first job, until enough ticks of its size
        have shown how fast it is alone (`ticks_alone`)."""
        job_tokens = self.ranks.size * self.config.job_tokens
        first = widen(selected[:1], token_budget=max_tokens, job_tokens=job_tokens)
        if selected[0].kind == "train" and self._throughput.num_alone(sum(first[0])) < self.config.ticks_alone:
            return selected[:1], first
        return selected, widen(selected, token_budget=max_tokens, job_tokens=job_tokens)

    def _compute(self, plan: TickPlan) -> Computed | None:
        """Gradients stay with the slices, until `_update` adds them up. None: it did not fit; the next tick is adapted.
        Raises OutOfMemory where a single slice fits on no rank."""
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
            self._throughput.learn(
                num_tokens=plan.num_tokens,
                cost=computed.cost,
                fullest_lane=computed.fullest_lane,
                num_jobs=len(plan.tokens),
                seconds=time.perf_counter() - started,
            )
        return computed

    def _update(self, plan: TickPlan, computed: Computed) -> list[StepOutcome]:
        outcomes: list[StepOutcome] = []
        for job, numbers in zip(self._in_tick, plan.by_job().values(), strict=True):
            job.served += sum(plan.sizes[number] for number in numbers)
            with interrupts_wait():  # half an optimizer step can be neither undone nor completed
                job.collect([plan.ranks[number] for number in numbers])
                outcomes.append(self._update_job(job, [computed.scores[number] for number in numbers]))
        return outcomes

    def _update_job(self, job: TrainingJob, scores: list[SliceScores]) -> StepOutcome:
        """Give the job its slices in their order. After one that diverged, the others are dropped. Events stay with the
        job, so that none is lost if another job of the tick fails."""
        outcome = StepOutcome(job=job, step=job.step, num_pending=len(job.pending))
        try:
            with shortage_of(job.name):
                for score in scores:
                    job.pending += job.receive(score) if job.unit is not None else []
        except OutOfMemory as error:
            outcome.error = error
        return outcome

    def _agree(self, outcomes: list[StepOutcome]) -> None:
        with interrupts_wait():  # a rank that left the exchange early would let the others wait
            self._errors += agree(self.ranks, outcomes, self.activations)
        self._in_tick = []

    def _take_events(self) -> list[Event]:
        events: list[Event] = []
        for job in self._jobs.values():
            events += job.pending
            job.pending = []
        return events

    def _least_served(self) -> int:
        """Where a new job's count of tokens begins, so that it neither overtakes the others for long nor waits."""
        return min((job.served for job in self._jobs.values() if job.starting is None), default=0)

    # What is made of a job's weights

    def save_checkpoint(self, job: str, directory: Path) -> None:
        """Write the state after the last completed step into a new directory (checkpoint.py). Raises ConfigError,
        BadCheckpoint, OSError."""
        checkpoint.save_checkpoint(self._started(job), self.base, directory)

    def export(
        self, job: str, directory: Path, *, base_name: str, between: Between = silent, has_evidence: bool = True
    ) -> ExportReport:
        """Write the adapter in PEFT's layout into a new directory: the weights after the last completed step, of a
        finished job those that it keeps (`JobConfig.keep`).

        `base_name` becomes `base_model_name_or_path`. `has_evidence`: two passes also compute logits, for verify.py to
        compare with PEFT's. `between` is called after each linear of these passes. Raises ConfigError, BadCheckpoint,
        OutOfMemory, OSError.
        """
        in_passes = shortage_in_pass(is_sharded=self.base.is_sharded and has_evidence)
        with in_passes, shortage_of(job), calling_at_linears(self.base, between):
            adapter = self._started(job).adapter
            return export_adapter(self.base, adapter, directory, base_name=base_name, has_evidence=has_evidence)

    def generation(self, prompts: Mapping[str, Prompts]) -> Generation:
        """Greedy answers to each job's prompts, by its current weights. No job of them may be ticked before the answers
        are complete. Training does not change. Raises ConfigError, BadCheckpoint."""
        rows = {job: (self._started(job).adapter, own) for job, own in prompts.items()}
        return Generation(self.base, rows, token_budget=self.config.token_budget)

    def compare_ranks(self, job: str) -> None:
        """Raises RanksDiffer, on all ranks, if they have different weights of the job. Call it before anything is made
        of them, or reported."""
        require_equal_weights(self.ranks, self._jobs[job])

    def _started(self, name: str) -> TrainingJob:
        """Raises ConfigError if the job is not loaded, and BadCheckpoint if an update of it broke off half way."""
        if name not in self._jobs:
            raise ConfigError(
                f"No job {name!r} is resident.", remedy=f"Name one of these: {', '.join(self._jobs) or 'none is'}."
            )
        job = self._jobs[name]
        if job.is_torn:
            raise BadCheckpoint(
                f"An update of job {name!r} broke off half way, and nothing can be made of its weights.",
                remedy="Evict it, and resume it from an earlier checkpoint.",
            )
        with shortage_of(name, part="start"):
            while job.starting is not None:
                job.go_on_starting(START_WORK)
        return job

    # Reports

    @property
    def idle(self) -> bool:
        """No job has a slice to compute, or an event or error to report."""
        return not self._errors and all(job.unit is None and not job.pending for job in self._jobs.values())

    def jobs(self) -> tuple[str, ...]:
        """Names of all loaded jobs, in the order of admission."""
        return tuple(self._jobs)

    def num_parameters(self, job: str) -> int:
        """Trained parameters of the adapter."""
        return self._jobs[job].adapter.num_parameters

    def trained_tokens(self, job: str) -> int:
        """Tokens of all completed steps, those before a resume included. Evaluations do not count."""
        return self._jobs[job].progress.num_tokens

    def progress(self, job: str) -> tuple[int, int]:
        """(completed steps, steps in total)."""
        return self._jobs[job].step, self._jobs[job].config.num_steps

    def evaluated_step(self, job: str) -> int | None:
        """The step of the job's current weights if these were evaluated, else None."""
        return self._jobs[job].evaluated_step

    @property
    def prefixes(self) -> PrefixCounts:
        """Tokens that the prefix cache has computed and saved so far."""
        return self._prefixes.counts()

    def tokens_per_second(self) -> float:
        """Tokens through the base model per second of tick time, averaged over recent ticks; 0 before the first."""
        return self._throughput.tokens_per_second

    def tick_speeds(self) -> dict[PackSize, list[tuple[int, float]]]:
        """(tokens, tokens per second) for each size of tick, of one job and of several."""
        return self._throughput.table()

    def memory(self) -> dict[str, int]:
        """Bytes of the base model, of all jobs' vectors, and the peak of the device (on a CPU, of the process)."""
        return {
            "base_bytes": self.base.num_bytes,
            "adapter_bytes": sum(job.num_bytes for job in self._jobs.values()),
            "peak_bytes": self.activations.peak_bytes(),
        }

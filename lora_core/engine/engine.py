# pyright: basic
"""The engine: jobs join and leave one resident base model at tick boundaries; nothing else decides here.

A tick is one forward and backward (or an evaluation's forward) over slices of its jobs.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lora_core.base_model.model import BaseModel
from lora_core.config import JobConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine import checkpoint
from lora_core.engine.cpu_lanes import Lanes
from lora_core.engine.fair_queue import ReadySlice, budget_after, select_slices, widen
from lora_core.engine.invariance_probe import Invariance, measure_invariance
from lora_core.engine.job import TrainingJob
from lora_core.engine.job_start import job_on
from lora_core.engine.prefix_cache import PrefixCounts, Prefixes
from lora_core.engine.step import PackSize, Passes, StepOutcome, StepStatus, TickPlan, TickSpeeds
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadCheckpoint, ConfigError, LoraCoreError, OutOfMemory, RanksDiffer
from lora_core.events import Event
from lora_core.forward.generation import Generation, Prompts
from lora_core.forward.progress_hooks import Between, silent, told_at_linears
from lora_core.layers.activation_checkpointing import ActivationMemory
from lora_core.losses.preference import SliceScores
from lora_core.peft_format.export import ExportReport, export_adapter
from lora_core.runtime.device_errors import interrupts_wait, shortage_in_pass, shortage_of

TICKS_TO_RECOVER = 1024
"""Ticks that fit in a row until the largest one has grown by the whole budget again."""
START_WORK = 2**30  # multiplications of starts in one tick, at least one weight's: a part of a second on a core


class Engine:
    """Trains every admitted job on `base`; one engine a base model. Not thread-safe: one caller ticks."""

    def __init__(self, base: BaseModel, config: EngineConfig, ranks: Ranks = ALONE) -> None:
        """ranks: those who train together; each makes an engine, and calls it as the others do
        (lora_core/distributed/ranks.py)."""
        if base.is_sharded:  # one pass of each rank at a time, and always through all blocks
            config = replace(config, num_lanes=1, prefix_memory_bytes=0, prefix_disk_bytes=0)
        self.base = base
        self.config = config
        self.ranks = ranks
        self._jobs: dict[str, TrainingJob] = {}
        self._rate = self._lane_rate = 0.0
        self._speeds = TickSpeeds()
        self._token_budget = self._largest_tick = ranks.size * config.token_budget
        self._short_ranks: set[int] = set()  # on which a slice alone didn't fit
        self._too_large: list[OutOfMemory] = []
        self._lanes = Lanes(config.num_lanes)
        self._begun: list[TrainingJob] = []
        attachment = base.attach(batch_invariant=config.batch_invariant)
        with ranks.together(), shortage_in_pass(is_sharded=base.is_sharded):
            verdict = measure_invariance(base, self._lanes)
        verdicts = ranks.gathered(verdict)
        self.invariance: Invariance = "bitwise" if set(verdicts) == {"bitwise"} else "allclose"
        self.activations = ActivationMemory(
            attachment.linears,
            device=base.device,
            item_bytes=base.dtype.itemsize,
            mode=config.checkpoint_blocks,
        )
        self._agree([])
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
        """Make `job` resident. What its start takes beyond START_WORK is left to the ticks that follow, so that its
        packmates don't wait for it; it trains once it has started.

        `parent`: the folder of an adapter whose weights the job begins with, and which it compares with where its
        objective compares (load_parent.py); the same one where it resumes. `shortages`: times that memory ran out for
        it before: ticks with it are smaller. Raises ConfigError where a job of this name is resident, the job needs a
        held-out set and has none, or asks for another adapter than its parent is, NoTargets, BadDataset, BadParent,
        BadCheckpoint, OutOfMemory; then nothing has changed.
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
                admitted.entry_block = self._prefixes.entry_block(admitted.row)
            with shortage_of(job, part="start"):
                admitted.go_on_starting(START_WORK)
        admitted.served, admitted.shortages = self._least_served(), shortages
        self._jobs[job] = admitted

    def tick(self) -> list[Event]:
        """Compute one tick and say what it completed. Without work: [] at once.

        Raises OutOfMemory for one job, which is quarantined; the next tick goes on with the others. Whatever else is
        raised within (a failure, Ctrl-C) is raised again, and the jobs of the tick compute their units anew.
        """
        self._undo()
        if self._too_large:
            raise self._too_large.pop(0)
        self._start()
        waiting = self._waiting()
        if waiting:
            try:
                self._compute(self._plan(waiting))
            except BaseException:
                self._undo()
                raise
        if self._too_large:
            raise self._too_large.pop(0)
        return self._take_pending()

    def _plan(self, waiting: list[ReadySlice]) -> TickPlan:
        """The leader's, for it follows from times and memory, which no two ranks have alike."""
        return TickPlan.of_json(self.ranks.told(self._own_plan(waiting).as_json() if self.ranks.leads else None))

    def _own_plan(self, waiting: list[ReadySlice]) -> TickPlan:
        budget = self._tick_tokens(waiting)
        turns, tokens = self._widened(select_slices(waiting, token_budget=budget), budget)
        plan = TickPlan(
            kind=turns[0].kind,
            tokens={turn.job: own for turn, own in zip(turns, tokens, strict=True)},
            ranks=tuple(self.ranks.shared_out(list(chain(*tokens)), short=self._short_ranks)),
        )
        is_short = self._shortages() > 0
        checkpointed = plan.kind == "train" and self.activations.checkpoints(plan.largest_share, is_short=is_short)
        return replace(plan, checkpointed=checkpointed)

    def _shortages(self) -> int:
        """Of the one who has had the most."""
        return max((job.shortages for job in self._jobs.values()), default=0)

    def _undo(self) -> None:
        """Of a tick that broke off: as if its jobs had not begun their units. Once more before the next tick, for this
        too may be interrupted."""
        self._lanes.settle()
        while self._begun:
            self._begun[-1].replay_unit()
            self._begun.pop()

    def _start(self) -> None:
        """A piece of the start of whoever has not started yet, the first that came."""
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

    def _least_served(self) -> int:
        """Tokens of the one who had the fewest: where a newcomer begins."""
        return min((job.served for job in self._jobs.values() if job.starting is None), default=0)

    def _widened(self, turns: list[ReadySlice], budget: int) -> tuple[list[ReadySlice], list[tuple[int, ...]]]:
        """The turns, and the tokens of each one's slices; of the first alone while ticks of it alone are wanted."""
        job_tokens = self.ranks.size * self.config.job_tokens
        first = widen(turns[:1], token_budget=budget, job_tokens=job_tokens)
        if turns[0].kind == "train" and self._speeds.num_alone(sum(first[0])) < self.config.ticks_alone:
            return turns[:1], first
        return turns, widen(turns, token_budget=budget, job_tokens=job_tokens)

    def evict(self, job: str) -> None:
        """Forget a job at any tick boundary; its row's memory is free at once, and after the last a GPU's as well."""
        del self._jobs[job]
        self._prefixes.leave(job)
        self._too_large = [error for error in self._too_large if error.job != job]
        assert self.base.attachment is not None
        self.base.attachment.segment_op.forget()
        self.activations.forget()
        self._short_ranks.clear()
        if not self._jobs and self.base.device.startswith("cuda"):
            torch.cuda.empty_cache()  # the driver counts as taken what torch keeps for later

    def save_checkpoint(self, job: str, directory: Path) -> None:
        """The state of the last completed step, into a directory that must not exist; see checkpoint.py."""
        checkpoint.save_checkpoint(self._started(job), self.base, directory)

    def export(
        self, job: str, directory: Path, *, base_name: str, between: Between = silent, has_evidence: bool = True
    ) -> ExportReport:
        """The adapter of the last completed step, of a finished job that of the step it keeps, in PEFT's layout, into
        a directory that must not exist. `between` is called after each linear of the two passes that give evidence."""
        in_passes = shortage_in_pass(is_sharded=self.base.is_sharded and has_evidence)
        with in_passes, shortage_of(job), told_at_linears(self.base, between):
            row = self._started(job).row
            return export_adapter(self.base, row, directory, base_name=base_name, has_evidence=has_evidence)

    def generation(self, asked: Mapping[str, Prompts]) -> Generation:
        """Greedy answers of resident jobs by the weights that they have now; none of them may be ticked before the
        answers are complete. Training is not touched. Raises ConfigError."""
        rows = {job: (self._started(job).row, prompts) for job, prompts in asked.items()}
        return Generation(self.base, rows, token_budget=self.config.token_budget)

    def _started(self, name: str) -> TrainingJob:
        """Raises ConfigError where there is none, and BadCheckpoint where an update of it broke off half way."""
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

    def num_parameters(self, job: str) -> int:
        return self._jobs[job].row.num_parameters

    def trained_tokens(self, job: str) -> int:
        """Tokens of all completed steps, those before a resume included, evaluations left out."""
        return self._jobs[job].progress.num_tokens

    def jobs(self) -> tuple[str, ...]:
        return tuple(self._jobs)

    def progress(self, job: str) -> tuple[int, int]:
        """(completed steps, steps in all)."""
        return self._jobs[job].step, self._jobs[job].config.num_steps

    def evaluated_step(self, job: str) -> int | None:
        """The step whose weights the job has, where they were evaluated."""
        return self._jobs[job].evaluated_step

    @property
    def prefixes(self) -> PrefixCounts:
        """What frozen prefixes have cost and saved so far."""
        return self._prefixes.counts()

    @property
    def idle(self) -> bool:
        """No job has a slice to compute, or an event or error to report."""
        return not self._too_large and all(job.unit is None and not job.pending for job in self._jobs.values())

    def tokens_per_second(self) -> float:
        """Tokens put through the base a second of tick time, averaged over recent ticks; 0 before the first."""
        return self._rate

    def tick_speeds(self) -> dict[PackSize, list[tuple[int, float]]]:
        """(tokens, tokens a second) of the sizes of ticks that were seen, of one job and of several; throughput.py."""
        return self._speeds.table()

    def memory(self) -> dict[str, int]:
        """Bytes of the base model, of all rows, and the peak of the device (of the process, on a CPU)."""
        rows_bytes = sum(job.num_bytes for job in self._jobs.values())
        return {
            "base_bytes": self.base.num_bytes,
            "rows_bytes": rows_bytes,
            "peak_bytes": self.activations.peak_bytes(),
        }

    def _compute(self, plan: TickPlan) -> None:
        """Events that it completes are left with their jobs, so that none is lost where a packmate fails."""
        jobs = [self._jobs[name] for name in plan.tokens]
        self._begun = list(jobs)
        started = time.perf_counter()
        try:
            own_tokens = plan.share_of(self.ranks.rank)
            with self.activations.observed(own_tokens, kind=plan.kind, checkpointed=plan.checkpointed):
                computed = self._passes.run(plan, self._jobs)
        except torch.OutOfMemoryError as error:
            gives_way = plan.kind == "train" and not plan.checkpointed
            if gives_way and self.activations.gives_way(plan.largest_share):
                self._undo()
            else:
                self._split_after_out_of_memory(jobs, plan, error)
            return
        growth = max(1, self.config.token_budget // TICKS_TO_RECOVER)
        self._largest_tick = min(self._token_budget, self._largest_tick + growth)
        if plan.kind == "train":
            seconds = time.perf_counter() - started
            self._learn_rates(plan.num_tokens, computed.fullest_lane, seconds)
            self._speeds.learn(num_tokens=plan.num_tokens, cost=computed.cost, num_jobs=len(jobs), seconds=seconds)
        booked: list[StepOutcome] = []
        for job, numbers in zip(jobs, plan.by_job().values(), strict=True):
            job.served += sum(plan.sizes[number] for number in numbers)
            with interrupts_wait():
                job.collect([plan.ranks[number] for number in numbers])
                booked.append(self._book(job, [computed.scores[number] for number in numbers]))
        with interrupts_wait():
            self._agree(booked)
        self._begun = []

    def _book(self, job: TrainingJob, scores: list[SliceScores]) -> StepOutcome:
        """In the order of slices; what follows one that diverged is left out."""
        booked = StepOutcome(job=job, step=job.step, num_pending=len(job.pending))
        try:
            with shortage_of(job.name):
                for score in scores:
                    job.pending += job.receive(score) if job.unit is not None else []
        except OutOfMemory as error:
            booked.shortage = error
        return booked

    def _agree(self, booked: list[StepOutcome]) -> None:
        """A job for which memory ran out on one rank, while a step of it was booked, is given up by all. And ticks are
        planned for the rank that has the least memory. Raises RanksDiffer, on all, where a job has not diverged on all
        of them in the same way and from the same weights: then no job is to blame."""
        own = self.activations.told() if self.ranks.size > 1 else (0, 0)
        told = self.ranks.numbers([*own, *(each.outcome for each in booked)])
        self.activations.heed(own, [(free_bytes, per_token) for free_bytes, per_token, *_ in told])
        for number, each in enumerate(booked, start=len(own)):
            outcomes = [of_rank[number] for of_rank in told]
            if StepStatus.SHORT in outcomes:
                self._too_large.append(each.given_up(is_shared=self.ranks.size > 1))
            elif any(outcomes):
                _require_equal(outcomes)
                self.compare_ranks(each.job.name)

    def compare_ranks(self, job: str) -> None:
        """Of every rank, before anything is made of its weights, or said of them: raises RanksDiffer, on all, where
        they have not the same."""
        held = self._jobs[job]
        if self.ranks.size > 1 and not held.is_torn:
            _require_equal(self.ranks.numbers(held.row.bit_sums()))

    def _take_pending(self) -> list[Event]:
        events: list[Event] = []
        for job in self._jobs.values():
            events += job.pending
            job.pending = []
        return events

    def _waiting(self) -> list[ReadySlice]:
        return [
            ReadySlice(job=name, kind=job.unit.kind, num_tokens=tokens[0], served=job.served, further=tokens[1:])
            for name, job in self._jobs.items()
            if job.starting is None and job.unit is not None and (tokens := job.waiting_tokens())
        ]

    def _tick_tokens(self, waiting: list[ReadySlice]) -> int:
        """The budget, less what memory, here or in jobs' attempts before, or the wished length of a tick forbids.

        A tick lasts as long as its fullest lane, and no shorter than one slice: a lane may hold the largest
        slice that waits, for it would last as long alone. Kept prefixes are left out of account: a tick with some
        lasts less than it might.
        """
        lane_tokens = int(self._lane_rate * self.config.max_tick_seconds) or self._largest_tick
        num_lanes = self.config.num_lanes * self.ranks.size
        largest_slice = max((turn.num_tokens for turn in waiting), default=0) if num_lanes > 1 else 0
        most = min(self._largest_tick, budget_after(self._shortages(), token_budget=self._token_budget))
        return min(most, num_lanes * max(lane_tokens, largest_slice))

    def _learn_rates(self, num_tokens: int, fullest_lane: int, seconds: float) -> None:
        self._rate = _averaged(self._rate, num_tokens / seconds)
        self._lane_rate = _averaged(self._lane_rate, fullest_lane / seconds)

    def _split_after_out_of_memory(self, jobs: list[TrainingJob], plan: TickPlan, error: Exception) -> None:
        """Half of a tick that didn't fit is tried next, and a slice alone by each rank; gradients are partial."""
        if len(plan.sizes) == 1:
            self._short_ranks.update(plan.ranks)
            if len(self._short_ranks) == self.ranks.size:
                self._short_ranks.clear()
                jobs[0].quarantine()
                raise OutOfMemory(jobs[0].name, num_tokens=plan.num_tokens) from error
        self._undo()
        self._largest_tick = max(1, plan.num_tokens // 2)


def _require_equal(of_ranks: Sequence[Any]) -> None:
    others = [rank for rank, own in enumerate(of_ranks) if own != of_ranks[0]]
    if others:
        raise RanksDiffer(others)


def _averaged(average: float, newest: float) -> float:
    return 0.8 * average + 0.2 * newest if average else newest

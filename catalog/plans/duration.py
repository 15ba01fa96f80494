"""Estimates how long a job would take and when it would start, each with the basis of the estimate. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from catalog.resources.throughput import Speeds, rate_alone
from catalog.spec.job import JobSpec
from catalog.spec.methods import MethodType, compares_with_start

BasisKind = Literal["measured", "scaled", "guess", "none"]
BEST_FIRST: tuple[BasisKind, ...] = ("measured", "scaled", "guess")
FLOPS_PER_PARAMETER = 4
"""FLOPs per token and parameter: 2 forward and 2 backward, because the base model's weights need no gradient."""
PEAK_TFLOPS: Mapping[str, float] = {
    "T4": 65, "V100": 125, "A10": 125, "L4": 121, "A40": 150, "A100": 312, "L40": 362, "RTX 3090": 71,
    "RTX 4090": 165, "RTX 5090": 210, "RTX A6000": 155, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
}  # fmt: skip
"""Peak of dense 16-bit matmuls by a part of the GPU's name, from NVIDIA's data sheets."""
REACHED_ON_GPU = 0.3
"""Fraction of the peak that a job that trains alone may reach. A guess."""
CPU_TFLOPS = 0.2
"""TFLOP/s per core, measured in training on a core with AVX-512. A core without it reached half. A guess for others."""
RANGES: Mapping[BasisKind, tuple[float, float]] = {"measured": (0.8, 1.5), "scaled": (0.5, 2.5), "guess": (0.3, 5.0)}
"""The shortest and the longest time that is likely, as multiples of the estimate of a part. A guess."""
READ_BYTES_PER_SECOND = 1e9
FIXED_SECONDS = 10.0
"""This and the one above: a guess of the time to load a base model, and to verify an adapter on it. The time grows with
the bytes of the base model, with 2 bytes per parameter."""
EVALUATIONS = 10
"""Default number of evaluations during a job, in addition to the one at its start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWork:
    """The amount of computation of a job."""

    num_steps: int
    tokens_per_step: float
    valid_tokens: int
    """Tokens per evaluation."""
    num_evaluations: int
    num_parameters: int
    """Parameters of the base model."""
    method: MethodType = "supervised"

    @property
    def tokens(self) -> float:
        """The equivalent number of training tokens. A forward pass without a backward pass counts half."""
        reference = 0.5 if compares_with_start(self.method) else 0.0
        trained = self.num_steps * self.tokens_per_step * (1 + reference)
        return trained + 0.5 * self.num_evaluations * self.valid_tokens * (1 + reference)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The speeds that a worker's trainer has measured with a base model."""

    worker_id: str
    base_name: str
    num_parameters: int
    speeds: Speeds


@dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """Seconds that jobs on this base model took before and after their training; None if none was recorded."""

    load_seconds: float | None = None
    """From the claim until the trainer has admitted the job. 0 if the base model is loaded now."""
    finish_seconds: float | None = None
    """Verification and publication."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """A worker that could train the job."""

    worker_id: str
    device: str
    """Name of its device."""
    kind: str
    num_cores: int | None
    same: Measured | None = None
    """Speeds with the same base model in the same precision and quantization."""
    other: Measured | None = None
    """Speeds with another base model."""
    overheads: Overheads = Overheads()


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """An estimate with its basis. If `seconds` is None, no estimate is possible, and `basis` explains why."""

    seconds: float | None
    basis_kind: BasisKind
    basis: str
    min_seconds: float | None = None
    max_seconds: float | None = None
    """This and the one above: the likely range, if there is one."""
    tokens_per_second: float | None = None
    worker_id: str | None = None


def work_of(
    spec: JobSpec, *, num_steps: int, tokens: int, usable_rows: int, valid_tokens: int | None, num_parameters: int
) -> TrainingWork:
    """Return the amount of computation of a job.

    tokens, usable_rows: of the training file. valid_tokens: of the validation file; None without one.
    """
    between = EVALUATIONS
    if spec.evaluation.every_steps is not None:
        between = num_steps // spec.evaluation.every_steps
    return TrainingWork(
        num_steps=num_steps,
        tokens_per_step=spec.batch_size * tokens / max(1, usable_rows),
        valid_tokens=valid_tokens or 0,
        num_evaluations=0 if valid_tokens is None else 1 + between,
        num_parameters=num_parameters,
        method=spec.method,
    )


def training_time(work: TrainingWork, runners: Sequence[Runner]) -> Estimate:
    """Estimate the time of a job that trains alone, from its claim to its adapter: load, training and verification.

    Uses the best available basis. Among workers with an equally good basis, the fastest one decides.
    """
    found = [estimate for runner in runners if (estimate := _estimate_on(work, runner)).seconds is not None]
    if not found:
        basis = "no running worker fits the job" if not runners else "the speed of the devices is unknown"
        return Estimate(seconds=None, basis_kind="none", basis=f"No estimate: {basis}.")
    return min(found, key=lambda one: (BEST_FIRST.index(one.basis_kind), one.seconds or 0.0))


def _estimate_on(work: TrainingWork, runner: Runner) -> Estimate:
    slice_tokens = max(1.0, work.tokens_per_step)
    if runner.same is not None and (rate := rate_alone(runner.same.speeds, slice_tokens)):
        basis = f"Measured on worker {runner.worker_id} ({runner.device}) with this base model"
        return _estimate(work, runner, rate, "measured", basis)
    if runner.other is not None and (rate := rate_alone(runner.other.speeds, slice_tokens)):
        scaled = rate * runner.other.num_parameters / max(1, work.num_parameters)
        basis = (
            f"Measured on worker {runner.worker_id} ({runner.device}) with the base model {runner.other.base_name}, "
            "and scaled by the number of parameters"
        )
        return _estimate(work, runner, scaled, "scaled", basis)
    tflops = _reached_tflops(runner)
    if tflops is None or not work.num_parameters:
        return Estimate(seconds=None, basis_kind="none", basis="")
    rate = tflops * 1e12 / (FLOPS_PER_PARAMETER * work.num_parameters)
    basis = (
        f"A rough guess, because no job has trained on worker {runner.worker_id} ({runner.device}) yet: training may "
        f"take several times as long. It assumes {FLOPS_PER_PARAMETER} FLOPs per parameter and token, at "
        f"{tflops:.3g} TFLOP/s"
    )
    return _estimate(work, runner, rate, "guess", basis)


def _estimate(work: TrainingWork, runner: Runner, rate: float, kind: BasisKind, basis: str) -> Estimate:
    guessed = FIXED_SECONDS + 2 * work.num_parameters / READ_BYTES_PER_SECOND
    load = _known_or(guessed, runner.overheads.load_seconds)
    finish = _known_or(guessed, runner.overheads.finish_seconds)
    parts: Sequence[tuple[float, BasisKind]] = (load, (work.tokens / rate, kind), finish)
    included = f"{_part(*load)} for loading, {_part(*finish)} for verification"
    return Estimate(
        seconds=sum(seconds for seconds, _ in parts),
        min_seconds=sum(RANGES[of_part][0] * seconds for seconds, of_part in parts),
        max_seconds=sum(RANGES[of_part][1] * seconds for seconds, of_part in parts),
        basis_kind=kind,
        basis=f"{basis}. The time includes {included}. With packmates, training takes longer.",
        tokens_per_second=rate,
        worker_id=runner.worker_id,
    )


def _known_or(guessed: float, measured: float | None) -> tuple[float, BasisKind]:
    return (guessed, "guess") if measured is None else (measured, "measured")


def _part(seconds: float, kind: BasisKind) -> str:
    return f"{seconds:.0f} s ({'a guess' if kind == 'guess' else kind})"


def _reached_tflops(runner: Runner) -> float | None:
    """The assumed TFLOP/s of a worker on which no job has trained yet, or None for an unknown device."""
    if runner.kind == "cpu":
        return None if runner.num_cores is None else CPU_TFLOPS * runner.num_cores
    known = [name for name in PEAK_TFLOPS if name in runner.device]
    return REACHED_ON_GPU * PEAK_TFLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedStart:
    """The inputs for the estimate of a job's start."""

    ahead: int
    """Number of queued jobs ahead of it."""
    typical_seconds: float | None
    """Median training time of the project's recent jobs; None if none has succeeded."""
    num_typical: int
    """Number of these jobs."""
    fitting: tuple[Occupied, ...]
    """Workers that can train the job."""
    num_live: int
    """Number of live workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupied:
    """The current load of a worker."""

    worker_id: str
    seconds_left: tuple[float | None, ...]
    """Remaining seconds of each of its jobs; None if a job has not reported them yet."""
    takes_it_now: bool
    """Its trainer has this base model loaded, in the required form, and accepts more jobs."""


def expected_start(place: ExpectedStart) -> Estimate:
    """Estimate the seconds from now until a worker would start the job, if its files are prepared."""
    if not place.fitting:
        why = "no worker is running" if not place.num_live else "no running worker has enough memory"
        return Estimate(seconds=None, basis_kind="none", basis=f"The job would not start: {why}.")
    if not place.ahead and any(not worker.seconds_left or worker.takes_it_now for worker in place.fitting):
        free = next(worker for worker in place.fitting if not worker.seconds_left or worker.takes_it_now)
        status = "has the base model loaded and accepts jobs" if free.takes_it_now else "is idle"
        return Estimate(
            seconds=0.0, basis_kind="measured", basis=f"Now: worker {free.worker_id} {status}, and no job is ahead."
        )
    return _after_others(place)


def _after_others(place: ExpectedStart) -> Estimate:
    """Simulate that each job ahead occupies a whole worker, for the median time of the project's recent jobs."""
    ahead = "No job is" if not place.ahead else "1 job is" if place.ahead == 1 else f"{place.ahead} jobs are"
    unknown = place.typical_seconds is None and (place.ahead or _has_unknown(place.fitting))
    if unknown:
        basis = f"{ahead} ahead. No estimate is possible, because no job of the project has succeeded yet."
        return Estimate(seconds=None, basis_kind="none", basis=basis)
    usual = place.typical_seconds or 0.0
    free_at = sorted(_free_in(worker, usual) for worker in place.fitting)
    for _ in range(min(place.ahead, 10_000)):
        free_at[0] += usual
        free_at.sort()
    basis = f"{ahead} ahead on {len(free_at)} suitable worker{'s' if len(free_at) > 1 else ''}"
    if place.typical_seconds is not None:
        basis += (
            f"; jobs are assumed to train one after another for {place.typical_seconds:.0f} s each, the median of the "
            f"project's last {place.num_typical}"
        )
    return Estimate(seconds=free_at[0], basis_kind="guess", basis=f"{basis}. Packed jobs start earlier.")


def _has_unknown(workers: Iterable[Occupied]) -> bool:
    return all(any(left is None for left in worker.seconds_left) for worker in workers)


def _free_in(worker: Occupied, usual: float) -> float:
    """Seconds until the worker could start the job.

    A trainer with the same base model can start it when one of its jobs finishes, others when all have finished.
    """
    left = [usual if seconds is None else seconds for seconds in worker.seconds_left]
    return max(left, default=0.0) if not worker.takes_it_now else min(left, default=0.0)


def median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) / 2) - 1] if ordered else None

"""How long a job would train, and when it would start: each with the basis of the number, or without a number. Pure."""

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
"""Of a token: 2 forward, 2 backward, for the base's weights have no gradient of their own."""
PEAK_TFLOPS: Mapping[str, float] = {
    "T4": 65, "V100": 125, "A10": 125, "L4": 121, "A40": 150, "A100": 312, "L40": 362, "RTX 3090": 71,
    "RTX 4090": 165, "RTX 5090": 210, "RTX A6000": 155, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
}  # fmt: skip
"""Dense 16-bit matrix products of a card, by a part of its name, from NVIDIA's data sheets."""
REACHED_ON_GPU = 0.3
"""Of that peak: what a job by itself may reach. A guess."""
CPU_TFLOPS = 0.2
"""Of a core, as training reached on one with AVX-512; half of it without. A guess elsewhere."""
EVALUATIONS = 10
"""Over a job that names no number, beside those at its start and its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWork:
    """What there is to compute."""

    num_steps: int
    tokens_per_step: float
    valid_tokens: int
    """Read at each evaluation."""
    num_evaluations: int
    num_parameters: int
    """Of the base."""
    method: MethodType = "supervised"

    @property
    def tokens(self) -> float:
        """As many tokens of training as take about as long: a pass without a backward counts half."""
        reference = 0.5 if compares_with_start(self.method) else 0.0
        trained = self.num_steps * self.tokens_per_step * (1 + reference)
        return trained + 0.5 * self.num_evaluations * self.valid_tokens * (1 + reference)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a worker's trainer of some base has learnt."""

    worker_id: str
    base_name: str
    num_parameters: int
    speeds: Speeds


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """A worker that could train the job."""

    worker_id: str
    device: str
    """Its name."""
    kind: str
    num_cores: int | None
    same: Measured | None = None
    """Of the same base in the same form."""
    other: Measured | None = None
    """Of another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """`seconds` None: there is no telling, and `basis` says why."""

    seconds: float | None
    basis_kind: BasisKind
    basis: str
    tokens_per_second: float | None = None
    worker_id: str | None = None


def work_of(
    spec: JobSpec, *, num_steps: int, tokens: int, usable_rows: int, valid_tokens: int | None, num_parameters: int
) -> TrainingWork:
    """tokens, usable_rows: of the training file. valid_tokens: of the held-out file; None without one."""
    between = EVALUATIONS
    if spec.evaluate_every_steps is not None:
        between = num_steps // spec.evaluate_every_steps
    return TrainingWork(
        num_steps=num_steps,
        tokens_per_step=spec.batch_size * tokens / max(1, usable_rows),
        valid_tokens=valid_tokens or 0,
        num_evaluations=0 if valid_tokens is None else 1 + between,
        num_parameters=num_parameters,
        method=spec.method,
    )


def training_time(work: TrainingWork, runners: Sequence[Runner]) -> Estimate:
    """Alone, without waiting, loading the base and verifying. The best basis there is decides; of equal ones the
    fastest worker."""
    found = [estimate for runner in runners if (estimate := _on(work, runner)).seconds is not None]
    if not found:
        basis = "no worker that fits it is running" if not runners else "nothing is known of the devices' speed"
        return Estimate(seconds=None, basis_kind="none", basis=f"No estimate: {basis}.")
    return min(found, key=lambda one: (BEST_FIRST.index(one.basis_kind), one.seconds or 0.0))


def _on(work: TrainingWork, runner: Runner) -> Estimate:
    slice_tokens = max(1.0, work.tokens_per_step)
    if runner.same is not None and (rate := rate_alone(runner.same.speeds, slice_tokens)):
        basis = f"Measured on worker {runner.worker_id} ({runner.device}) with this base"
        return _estimate(work, runner, rate, "measured", basis)
    if runner.other is not None and (rate := rate_alone(runner.other.speeds, slice_tokens)):
        scaled = rate * runner.other.num_parameters / max(1, work.num_parameters)
        basis = (
            f"Measured on worker {runner.worker_id} ({runner.device}) with the base {runner.other.base_name}, and "
            "scaled by the bases' parameters"
        )
        return _estimate(work, runner, scaled, "scaled", basis)
    tflops = _reached_tflops(runner)
    if tflops is None or not work.num_parameters:
        return Estimate(seconds=None, basis_kind="none", basis="")
    rate = tflops * 1e12 / (FLOPS_PER_PARAMETER * work.num_parameters)
    basis = (
        f"A guess, and it may take several times as long: nothing has trained on worker {runner.worker_id} "
        f"({runner.device}) yet, so {FLOPS_PER_PARAMETER} FLOPs are reckoned for each parameter and token, at "
        f"{tflops:.3g} TFLOP/s"
    )
    return _estimate(work, runner, rate, "guess", basis)


def _estimate(work: TrainingWork, runner: Runner, rate: float, kind: BasisKind, basis: str) -> Estimate:
    return Estimate(
        seconds=work.tokens / rate,
        basis_kind=kind,
        basis=f"{basis}. Beside other jobs it takes longer; loading the base and verifying come on top.",
        tokens_per_second=rate,
        worker_id=runner.worker_id,
    )


def _reached_tflops(runner: Runner) -> float | None:
    if runner.kind == "cpu":
        return None if runner.num_cores is None else CPU_TFLOPS * runner.num_cores
    known = [name for name in PEAK_TFLOPS if name in runner.device]
    return REACHED_ON_GPU * PEAK_TFLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedStart:
    """Where the job would stand, and who is before it."""

    ahead: int
    """Jobs of the queue that have their turn before it."""
    typical_seconds: float | None
    """How long the project's jobs trained lately, in the median; None where none has ended."""
    num_typical: int
    fitting: tuple[Occupied, ...]
    """Workers that it fits."""
    num_live: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupied:
    """A worker as it is now."""

    worker_id: str
    seconds_left: tuple[float | None, ...]
    """Of each job that it trains; None where one has not said yet."""
    takes_it_now: bool
    """It has this base loaded, in this form, and room."""


def expected_start(place: ExpectedStart) -> Estimate:
    """Seconds from now until a worker would take it, once its files are prepared."""
    if not place.fitting:
        why = "no worker is running" if not place.num_live else "no worker that runs has the memory for it"
        return Estimate(seconds=None, basis_kind="none", basis=f"It would not start: {why}.")
    if not place.ahead and any(not worker.seconds_left or worker.takes_it_now for worker in place.fitting):
        free = next(worker for worker in place.fitting if not worker.seconds_left or worker.takes_it_now)
        what = "has the base loaded and room" if free.takes_it_now else "is free"
        return Estimate(
            seconds=0.0, basis_kind="measured", basis=f"At once: worker {free.worker_id} {what}, and no job is ahead."
        )
    return _after_others(place)


def _after_others(place: ExpectedStart) -> Estimate:
    """As if each of the jobs ahead took a worker for itself, for as long as jobs lately did."""
    ahead = "No job is" if not place.ahead else "1 job is" if place.ahead == 1 else f"{place.ahead} jobs are"
    unknown = place.typical_seconds is None and (place.ahead or _has_unknown(place.fitting))
    if unknown:
        basis = f"{ahead} ahead, and no job of the project has ended yet, so there is no telling how long they take."
        return Estimate(seconds=None, basis_kind="none", basis=basis)
    usual = place.typical_seconds or 0.0
    free_at = sorted(_frees(worker, usual) for worker in place.fitting)
    for _ in range(min(place.ahead, 10_000)):
        free_at[0] += usual
        free_at.sort()
    basis = f"{ahead} ahead on {len(free_at)} worker{'s' if len(free_at) > 1 else ''} that it fits"
    if place.typical_seconds is not None:
        basis += (
            f"; each is taken to train as long as the project's last {place.num_typical} did in the median "
            f"({place.typical_seconds:.0f} s), one after another"
        )
    return Estimate(seconds=free_at[0], basis_kind="guess", basis=f"{basis}. Packed together they go faster.")


def _has_unknown(workers: Iterable[Occupied]) -> bool:
    return all(any(left is None for left in worker.seconds_left) for worker in workers)


def _frees(worker: Occupied, usual: float) -> float:
    """When the first of its jobs has ended, if it takes this one then; else when all have."""
    left = [usual if seconds is None else seconds for seconds in worker.seconds_left]
    return max(left, default=0.0) if not worker.takes_it_now else min(left, default=0.0)


def median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) / 2) - 1] if ordered else None

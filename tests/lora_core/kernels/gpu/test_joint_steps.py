"""A tick measures the steps of all jobs together and takes them together, and a failure marks the right jobs torn.

The launches of a GPU are replaced by the code of a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_core.adapter import optimizer
from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.engine import job as job_module
from lora_core.engine import joint_steps as joint_module
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadCheckpoint, OutOfMemory
from lora_core.kernels.gpu.optimizer_table import AdamwStep
from tests.lora_core.scenarios import Submission, admit, config, dataset, state_bytes

Load = Callable[..., BaseModel]
JOBS = {
    name: Submission(config=config(seed=seed, num_steps=3), train=dataset(seed, [9, 14]))
    for seed, name in enumerate(("first", "second", "third"))
}
SGD = replace(
    JOBS["third"],
    config=replace(JOBS["third"].config, optimizer=optimizer.OptimizerConfig(kind="sgd", learning_rate=1e-2)),
)


class OnGpu:
    """Stand-ins of the launches. `fails` raises an error at the named point. Where a point `is_small`, memory is
    enough for one job alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = Counter[str]()
        self.fails: dict[str, BaseException] = {}
        self.is_small: str | None = None
        monkeypatch.setattr(optimizer, "has_gpu_kernels", lambda _: True)
        monkeypatch.setattr(joint_module, "joint_step_sizes", self.sizes)
        monkeypatch.setattr(joint_module, "joint_steps", self.launches)

    def reach(self, point: str, *, num_jobs: int = 1) -> None:
        self.calls[point] += 1
        if point in self.fails:
            raise self.fails[point]
        if point == self.is_small and num_jobs > 1:
            raise torch.OutOfMemoryError("simulated")

    def sizes(self, adapters: Sequence[FlatAdapter]) -> Tensor:
        self.reach("sizes", num_jobs=len(adapters))
        return torch.stack(
            [
                torch.stack([torch.linalg.vector_norm(adapter.g), adapter.p.abs().max(), adapter.m.abs().max()])
                for adapter in adapters
            ]
        )

    def launches(self, steps: Sequence[AdamwStep]) -> list[Callable[[], None]]:
        self.reach("upload", num_jobs=len(steps))
        return [lambda: self.run(steps)]

    def run(self, steps: Sequence[AdamwStep]) -> None:
        for step in steps:
            step.g.mul_(step.clip)
            step.m.lerp_(step.g, 1 - step.beta1)
            step.v.mul_(step.beta2).addcmul_(step.g, step.g, value=1 - step.beta2)
            root = step.v.sqrt().div_((1 - step.beta2**step.step) ** 0.5).add_(step.eps)
            step.p.mul_(1 - step.rate * step.weight_decay)
            step.p.addcdiv_(step.m, root, value=-step.rate / (1 - step.beta1**step.step))
            step.g.zero_()
            self.reach("launch")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    return OnGpu(monkeypatch)


def engine_of(base: BaseModel, **jobs: Submission) -> Engine:
    engine = Engine(base, EngineConfig(token_budget=4096))
    for name, job in jobs.items():
        admit(engine, name, job)
    return engine


def errors_of(engine: Engine) -> list[str]:
    """Tick until all errors are raised. Returns the jobs that ran out of memory."""
    failed: list[str] = []
    while True:
        try:
            engine.tick()
        except OutOfMemory as error:
            failed.append(error.job)
            if not engine._errors:
                return failed


def test_all_steps_of_a_tick_are_measured_and_taken_together(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    separate = engine_of(load("llama"), **JOBS)
    while not separate.idle:
        separate.tick()
    stand_in = OnGpu(monkeypatch)
    engine = engine_of(load("llama"), **JOBS)

    engine.tick()
    assert stand_in.calls == {"sizes": 1, "upload": 1, "launch": 3}
    while not engine.idle:
        engine.tick()

    assert stand_in.calls == {"sizes": 3, "upload": 3, "launch": 9}
    for name in JOBS:
        assert engine.progress(name) == (3, 3)
        assert state_bytes(engine, name) == state_bytes(separate, name)


def test_other_optimizers_are_measured_together_and_step_alone(load: Load, on_gpu: OnGpu) -> None:
    engine = engine_of(load("llama"), first=JOBS["first"], sgd=SGD)

    engine.tick()

    assert on_gpu.calls == {"sizes": 1, "upload": 1, "launch": 1}
    assert [engine.progress(name)[0] for name in ("first", "sgd")] == [1, 1]


@pytest.mark.parametrize("point", ["sizes", "upload"])
def test_shortage_before_the_launch_changes_no_weights(load: Load, on_gpu: OnGpu, point: str) -> None:
    engine = engine_of(load("llama"), **JOBS)
    before = {name: engine._jobs[name].adapter.p.clone() for name in JOBS}
    on_gpu.fails[point] = torch.OutOfMemoryError("simulated")

    assert errors_of(engine) == list(JOBS)

    assert on_gpu.calls["launch"] == 0
    for name, weights in before.items():
        job = engine._jobs[name]
        assert torch.equal(job.adapter.p, weights)
        assert (job.step, job.is_torn, job.unit) == (0, False, None)


@pytest.mark.parametrize("point", ["sizes", "upload"])
def test_jobs_step_alone_where_memory_is_too_short_for_all(
    load: Load, on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    together = engine_of(load("llama"), **JOBS)
    together.tick()
    engine = engine_of(load("llama"), **JOBS)
    on_gpu.is_small = point
    on_gpu.calls.clear()

    engine.tick()

    assert on_gpu.calls == {"sizes": 1, "upload": 1, "launch": 3} | {point: 1 + len(JOBS)}
    for name in JOBS:
        assert engine.progress(name) == (1, 3)
        assert state_bytes(engine, name) == state_bytes(together, name)


def test_shortage_in_the_launch_marks_all_its_jobs_torn(load: Load, on_gpu: OnGpu) -> None:
    engine = engine_of(load("llama"), **JOBS)
    on_gpu.fails["launch"] = torch.OutOfMemoryError("simulated")

    assert errors_of(engine) == list(JOBS)

    assert [(job.step, job.is_torn) for job in engine._jobs.values()] == [(0, True)] * 3


def test_error_in_the_launch_marks_all_its_jobs_torn_and_is_raised(load: Load, on_gpu: OnGpu) -> None:
    engine = engine_of(load("llama"), **JOBS)
    on_gpu.fails["launch"] = RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.tick()

    assert engine.idle
    for name in JOBS:
        with pytest.raises(BadCheckpoint, match=f"Job '{name}' has undefined weights"):
            engine.adapter(name)


def test_shortage_after_the_launch_marks_its_own_job_torn(
    load: Load, on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(load("llama"), **JOBS)
    bad, refresh = engine._jobs["second"].adapter, FlatAdapter.refresh_derived

    def limited(adapter: FlatAdapter) -> None:
        if adapter is bad:
            raise torch.OutOfMemoryError("simulated")
        refresh(adapter)

    monkeypatch.setattr(FlatAdapter, "refresh_derived", limited)

    assert errors_of(engine) == ["second"]

    assert [(job.step, job.is_torn) for job in engine._jobs.values()] == [(1, False), (0, True), (1, False)]


def test_job_that_diverges_does_not_step(load: Load, on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(load("llama"), **JOBS)
    bad, stays_finite = engine._jobs["first"].adapter, job_module.stays_finite
    monkeypatch.setattr(
        job_module,
        "stays_finite",
        lambda adapter, *given, **named: adapter is not bad and stays_finite(adapter, *given, **named),
    )

    events = engine.tick()

    assert [type(event).__name__ for event in events] == ["JobDiverged", "JobStepped", "JobStepped"]
    assert on_gpu.calls["launch"] == 2

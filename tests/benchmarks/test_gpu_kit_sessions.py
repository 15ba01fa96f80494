"""A session of the GPU kit starts its jobs before the first step, and counts every token that its ticks compute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.kit import ablations
from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.load import Load
from benchmarks.gpu.kit.log import Log
from benchmarks.gpu.kit.sessions import session
from benchmarks.gpu.kit.shapes import TOY, build
from benchmarks.gpu.kit.sizes import Budgets, full, quick
from lora_core.base_model.model import BaseModel
from lora_core.engine import engine as engine_module
from lora_core.engine import step
from lora_core.engine.engine import Engine
from lora_core.engine.step import TickPlan
from lora_core.events import Event
from lora_core.kernels.selection import Kernels

LOAD = Load(num_jobs=5, batch_size=2, shortest=4, longest=24, rank=4)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return build(TOY, device="cpu")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[TickPlan]:
    """The plan of each tick, in order."""
    plans: list[TickPlan] = []
    plan = Engine._plan

    def noted(engine: Engine) -> TickPlan | None:
        found = plan(engine)
        plans.extend([found] if found else [])
        return found

    monkeypatch.setattr(Engine, "_plan", noted)
    return plans


def test_jobs_are_complete_before_the_first_step(
    base: BaseModel, planned: list[TickPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an 8B base model, whose adapters take many times START_WORK."""
    monkeypatch.setattr(engine_module, "START_WORK", 1)
    budgets = Budgets(tick_tokens=LOAD.largest_tick, job_tokens=64, slice_tokens=64)

    with session(base, LOAD, Kernels(), budgets) as opened:
        stepped = opened.step()

    assert stepped.ticks == 1
    assert [len(plan.tokens) for plan in planned] == [LOAD.num_jobs]


@pytest.mark.parametrize("tick_tokens", [30, 64, 100, 240])
def test_tokens_of_a_step_are_those_that_its_ticks_compute(
    base: BaseModel, planned: list[TickPlan], tick_tokens: int
) -> None:
    budgets = Budgets(tick_tokens=tick_tokens, job_tokens=64, slice_tokens=64)

    with session(base, LOAD, Kernels(), budgets) as opened:
        for _ in range(4):
            planned.clear()
            stepped = opened.step()

            assert stepped.tokens == sum(plan.num_tokens for plan in planned)
            assert stepped.ticks == len(planned)


def test_slices_below_a_step_are_refused_because_events_would_not_count_them(base: BaseModel) -> None:
    too_small = Budgets(tick_tokens=64, job_tokens=64, slice_tokens=LOAD.largest_step - 1)

    with pytest.raises(AssertionError, match="a step is one slice"), session(base, LOAD, Kernels(), too_small):
        pass


def test_divergence_ends_the_step_with_its_message(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run_training: Callable[..., list[Any]] = step.run_training

    def without_numbers(*args: Any) -> list[Any]:
        return [replace(scores, loss_sum=float("nan")) for scores in run_training(*args)]

    monkeypatch.setattr(step, "run_training", without_numbers)

    with (
        session(base, LOAD, Kernels(), quick().budgets) as opened,
        pytest.raises(RuntimeError, match=r"Job \d diverged after step 0: The loss of train slice 1 is not finite"),
    ):
        opened.step()


def test_engine_without_work_ends_the_step(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(base, LOAD, Kernels(), quick().budgets) as opened:
        for job in opened.engine._jobs.values():
            job.quarantine()

        with pytest.raises(RuntimeError, match="No job has work left"):
            opened.step()


def test_tick_without_events_is_no_failure_while_jobs_have_work(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick, num_ticks = Engine.tick, 0

    def short_at_first(engine: Engine) -> list[Event]:
        nonlocal num_ticks
        num_ticks += 1
        return [] if num_ticks == 1 else tick(engine)

    monkeypatch.setattr(Engine, "tick", short_at_first)
    with session(base, LOAD, Kernels(), quick().budgets) as opened:
        assert opened.step().tokens > 0


def test_ticks_that_recompute_blocks_are_counted(base: BaseModel) -> None:
    with session(base, LOAD, Kernels(), quick().budgets) as opened:
        kept = opened.step()
        opened.engine.activations.mode = "always"
        recomputed = opened.step()

    assert kept.recomputed == 0
    assert recomputed.recomputed == recomputed.ticks > 0


def test_large_base_model_has_the_memory_to_itself(tmp_path: Path) -> None:
    kit = Kit(log=Log(tmp_path, started=time.monotonic()), sizes=quick())
    small = kit.base(kit.sizes.small)
    assert kit.base(kit.sizes.small) is small

    large = kit.base(kit.sizes.large)

    assert kit.bases == {kit.sizes.large.name: large}
    kit.base(kit.sizes.small)
    assert len(kit.bases) == 2, "it takes a part of what the small one leaves"


def test_ablations_begin_with_fast_variants_and_end_with_those_of_most_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = Kit(log=Log(tmp_path, started=time.monotonic()), sizes=full())
    fastest = Kernels(lora="tiled", attention="varlen", elementwise="compiled")
    monkeypatch.setattr(ablations, "chosen", lambda kit: fastest)

    names = list(ablations.variants(kit))

    assert names[:2] == ["as chosen", "the service's constants"]
    assert names[-4:] == ["elementwise: eager", "attention: sequences", "lora: loop", "plain kernels"]
    ticks = [int(name.split()[-2]) for name in names if name.startswith("ticks")]
    assert ticks == sorted(kit.sizes.ablated_ticks, reverse=True)

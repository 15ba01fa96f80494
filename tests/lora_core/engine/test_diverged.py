"""A diverged job names the newest weights from which training can continue."""

from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lora_core.engine import job as job_module
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobDiverged, JobFinished, JobStepped
from tests.lora_core.scenarios import Submission, admit, config, dataset

JOB = Submission(config=config(num_steps=7, seed=2, slice_tokens=40), train=dataset(1, [20, 33, 15]))
EVALUATED = replace(JOB, config=replace(JOB.config, evaluate_every_steps=4), valid=dataset(9, [12, 20]))
UNCLIPPED = replace(JOB, config=replace(JOB.config, optimizer=replace(JOB.config.optimizer, max_grad_norm=None)))


def a_rate_of(learning_rate: float) -> Callable[[Engine, pytest.MonkeyPatch], None]:
    """Return a function that sets this learning rate in the fourth step only."""

    def damage(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        usual = job_module.learning_rate_at
        patch.setattr(
            job_module,
            "learning_rate_at",
            lambda step, **schedule: learning_rate if step == 4 else usual(step, **schedule),
        )

    return damage


def an_infinite_gradient(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Make the gradient norm infinite in the fourth step only."""
    usual = job_module.step_sizes

    def damaged(*args: Any, **kwargs: Any) -> Tensor:
        sizes = usual(*args, **kwargs)
        return sizes.fill_(float("inf")) if engine.progress("bad")[0] == 3 else sizes

    patch.setattr(job_module, "step_sizes", damaged)


RUINS = {
    "the loss after a ruinous step": (JOB, a_rate_of(1e30), 4, 3),
    "a gradient of zero after a ruinous step": (JOB, a_rate_of(1e9), 4, 3),
    "a gradient of zero after an evaluation": (EVALUATED, a_rate_of(1e9), 4, 3),
    "the evaluation after a ruinous step": (EVALUATED, a_rate_of(1e30), 4, 3),
    "a gradient": (JOB, an_infinite_gradient, 3, 2),
    "an update": (UNCLIPPED, a_rate_of(1e39), 3, 3),
}


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ruin", RUINS)
def test_diverged_job_continues_from_its_good_step_at_a_sane_rate(load, tmp_path, monkeypatch, dtype, ruin):
    job, damage, last_step, good_step = RUINS[ruin]
    engine = Engine(load("llama", dtype), EngineConfig())
    admit(engine, "bad", job)
    with monkeypatch.context() as patch:
        damage(engine, patch)
        events = with_a_checkpoint_of_each_step(engine, tmp_path)
    diverged = events[-1]
    assert isinstance(diverged, JobDiverged)
    assert (diverged.step, diverged.good_step) == (last_step, good_step)

    resumed = Engine(load("llama", dtype), EngineConfig())
    admit(resumed, "bad", job, resume_from=tmp_path / f"step-{diverged.good_step}")
    events = with_a_checkpoint_of_each_step(resumed, tmp_path / "sane")

    steps = [event for event in events if isinstance(event, JobStepped)]
    assert [event.step for event in steps] == list(range(good_step + 1, 8))
    assert all(isfinite(event.loss) and isfinite(event.grad_norm) for event in steps)
    assert isinstance(events[-1], JobFinished)


def with_a_checkpoint_of_each_step(engine: Engine, folder: Path) -> list[Event]:
    """Return all events of `bad`. Write a checkpoint right after each step, as if it were due then."""
    events: list[Event] = []
    while not engine.idle:
        new = engine.tick()
        for event in new:
            if isinstance(event, JobStepped):
                engine.save_checkpoint("bad", folder / f"step-{event.step}")
        events += new
    return events


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_a_job_whose_first_loss_is_not_finite_has_no_good_weights(load, is_evaluated):
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "bad", EVALUATED if is_evaluated else JOB)
    engine._jobs["bad"].adapter.p.fill_(float("nan"))

    events = engine.tick()

    what = "evaluate" if is_evaluated else "train"
    message = f"The loss of {what} slice 1 is not finite."
    assert events == [JobDiverged(job="bad", step=0, good_step=None, message=message)]

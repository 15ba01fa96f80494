"""Divergence: which gradients and losses end a job, and the weights from which its training can continue."""

from collections.abc import Callable
from dataclasses import replace
from math import isfinite, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.engine import job as job_module
from lora_core.engine.divergence import is_dead
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobDiverged, JobFinished, JobStepped
from tests.lora_core.classifiers import classification_jobs, classifier
from tests.lora_core.scenarios import (
    VOCAB,
    Submission,
    admit,
    config,
    dataset,
    preferences,
    run_alone,
    weights,
)

PLAIN = Submission(config=config(num_steps=9, seed=2, slice_tokens=40), train=dataset(1, [20, 33, 15]))


def at_rate(learning_rate: float, **options) -> Submission:
    return replace(
        PLAIN, config=replace(PLAIN.config, optimizer=OptimizerConfig(learning_rate=learning_rate, **options))
    )


ABSURD = at_rate(1e9)
RUINED = {
    "adamw at 1e3": at_rate(1e3),
    "adamw at 1e6": at_rate(1e6),
    "adamw at 1e9": ABSURD,
    "sgd at 1e6": at_rate(1e6, kind="sgd"),
    "adafactor at 1e12": at_rate(1e12, kind="adafactor", scale_floor=1e3),
    "noise": replace(ABSURD, config=replace(ABSURD.config, neftune_alpha=5.0)),
    "dora and dropout": replace(
        ABSURD, config=replace(ABSURD.config, lora=LoraConfig(rank=4, alpha=8, dropout=0.1, use_dora=True))
    ),
    "smoothed labels": replace(ABSURD, config=replace(ABSURD.config, objective=ObjectiveConfig(label_smoothing=0.1))),
}


def events_of(base: BaseModel, job: Submission) -> list[Event]:
    return list(run_alone(base, job).events)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ruin", RUINED)
def test_job_with_a_vanished_gradient_ends_as_diverged(load, ruin, dtype):
    engine = Engine(load("llama", dtype), EngineConfig())
    admit(engine, "job", RUINED[ruin])
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()

    *steps, diverged = events
    assert isinstance(diverged, JobDiverged)
    assert diverged.message == (
        f"The gradient of step {len(steps) + 1} is exactly zero at a loss of {log(VOCAB):.4g}: "
        "no step from these weights can lower it."
    )
    assert (diverged.step, diverged.good_step) == (len(steps), len(steps) - 1)
    assert all(isinstance(event, JobStepped) and event.grad_norm > 0 for event in steps)
    assert torch.isfinite(weights(engine, "job")).all()


def test_classifier_with_a_vanished_gradient_ends_as_diverged(tmp_path):
    job = classification_jobs()["three"]
    sound = replace(job.config, evaluate_every_steps=None, num_steps=3)
    base = classifier("llama", tmp_path / "llama")

    events = events_of(base, replace(job, config=replace(sound, optimizer=ABSURD.config.optimizer), valid=None))

    assert isinstance(events[-1], JobDiverged)
    assert "is exactly zero at a loss of 1.099" in events[-1].message  # ln 3


def test_job_with_memorized_rows_finishes_without_a_gradient(load):
    base = load("llama")
    base.model.lm_head.weight.data.mul_(
        1e4
    )  # saturates the softmax: the second most likely token has probability 0 in fp32
    row = greedy(base, [5, 9], num_tokens=10)

    events = events_of(base, Submission(config=config(batch_size=1, num_steps=3), train=row))

    *steps, finished = events
    assert isinstance(finished, JobFinished)
    assert [(event.loss, event.grad_norm) for event in steps if isinstance(event, JobStepped)] == [(0, 0)] * 3


def greedy(base: BaseModel, prompt: list[int], *, num_tokens: int) -> TokenDataset:
    """Return one row: the prompt and the base model's own answer, which is supervised."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    mask = np.arange(len(ids)) >= len(prompt)
    return TokenDataset(
        input_ids=np.array(ids, np.int32), loss_mask=mask.astype(np.uint8), row_offsets=np.array([0, len(ids)])
    )


def following(*before: int) -> TokenDataset:
    """Return two equal rows with one label each, after the given tokens."""
    row = [*before, 11]
    return TokenDataset(
        input_ids=np.array(row * 2, np.int32),
        loss_mask=np.array(([0] * len(before) + [1]) * 2, np.uint8),
        row_offsets=np.array([0, len(row), 2 * len(row)]),
    )


@pytest.mark.parametrize(("before", "expected"), [((7,), False), ((7, 7, 7), False), ((7, 7, 8), True)])
def test_zero_gradient_is_a_divergence_only_if_attention_has_a_choice(before, expected):
    row = SimpleNamespace(g=torch.zeros(3))
    step: dict[str, Any] = {"dataset": following(*before), "slices": [(0,), (1,)], "norm": 0.0, "loss": 2.0}

    assert is_dead(cast(FlatAdapter, row), ObjectiveConfig(), **step) is expected


def test_zero_gradient_of_queries_and_keys_without_a_choice_is_valid(load):
    """After one token, attention has only one position to attend to."""
    job = Submission(
        config=config(targets=r"re:.*0\.self_attn\.(q|k)_proj", batch_size=1, num_steps=3), train=following(7)
    )

    events = events_of(load("llama"), job)

    *steps, finished = events
    assert isinstance(finished, JobFinished)
    assert all(isinstance(event, JobStepped) and event.loss > 1 and event.grad_norm == 0 for event in steps)


def test_saturated_preference_has_no_gradient_and_finishes(load):
    job = preferences()["kto"]
    certain = replace(job.config, objective=ObjectiveConfig(kind="kto", beta=1e6), evaluate_every_steps=None)

    events = events_of(load("llama"), replace(job, config=certain, valid=None))

    assert isinstance(events[-1], JobFinished)
    assert [event for event in events if isinstance(event, JobStepped) and event.grad_norm == 0 and event.loss > 0.1]


def test_a_gradient_too_small_for_its_norm_is_not_zero(load):
    """The squares of 1e-25 underflow to 0 in fp32, so the norm is 0."""
    tiny = replace(config(num_steps=3), lora=LoraConfig(rank=4, alpha=1e-24))

    events = events_of(load("llama"), Submission(config=tiny, train=PLAIN.train))

    *steps, finished = events
    assert isinstance(finished, JobFinished)
    assert [event.grad_norm for event in steps if isinstance(event, JobStepped)] == [0, 0, 0]


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

"""Finite but worthless weights: the loss is constant, its gradient is exactly zero, and the job ends as diverged.

Two cases are not a divergence: a memorized dataset, and steps that never have a gradient.
"""

from dataclasses import replace
from math import log
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from lora_core.data.token_dataset import TokenDataset
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

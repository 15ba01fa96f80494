"""Invariant: a job stopped at any tick continues in another engine and ends with the same bytes."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_core.config import ObjectiveConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    numbers,
    rename,
    run_alone,
    starts,
    state_bytes,
)

JOB = Submission(
    config=config(rank=4, dropout=0.2, batch_size=4, num_steps=4, seed=11, evaluate_every_steps=2, slice_tokens=40),
    train=dataset(11, [22, 35, 9, 14, 28, 6]),
    valid=dataset(12, [30, 17]),
)
PAIRS = Submission(
    config=config(
        batch_size=3,
        num_steps=3,
        seed=14,
        evaluate_every_steps=2,
        slice_tokens=50,
        objective=ObjectiveConfig(kind="dpo", beta=0.5),
    ),
    train=dataset(14, [9, 14, 31, 12, 5, 40, 3, 2]),
    valid=dataset(15, [12, 25, 8, 7]),
)
IN_FULL = Submission(
    config=replace(
        JOB.config,
        lora=replace(JOB.config.lora, modules_to_save=("lm_head",), trainable_token_indices=tuple(range(50))),
    ),
    train=JOB.train,
    valid=JOB.valid,
)
PACKMATE = Submission(config=config(rank=8, batch_size=3, num_steps=50, seed=13), train=dataset(13, [25, 41, 8]))


def run_until(engine: Engine, *, ticks: int) -> list[Event]:
    events: list[Event] = []
    for _ in range(ticks):
        events += engine.tick()
    return events


def finish_elsewhere(base, checkpoint: Path, job: Submission = JOB) -> tuple[bytes, list[Event]]:
    """Resume together with another job, under a token budget of one slice per tick."""
    engine = Engine(base, EngineConfig(token_budget=30))
    admit(engine, "packmate", PACKMATE)
    admit(engine, "job", job, resume_from=checkpoint)
    events: list[Event] = []
    while not any(type(event).__name__ == "JobFinished" and event.job == "job" for event in events):
        events += engine.tick()
    return state_bytes(engine, "job"), events


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(
    ("family", "dtype", "job"),
    [
        ("llama", "bfloat16", JOB),
        ("gpt2", "float32", JOB),
        ("llama", "float32", PAIRS),
        ("llama", "float32", numbers()["sgd_wsd"]),
        ("gpt2", "bfloat16", numbers()["noisy_smooth"]),
        ("llama", "bfloat16", numbers()["early_best"]),
        ("llama", "float32", IN_FULL),
        ("llama", "bfloat16", starts()["pissa"]),
        ("gpt2", "float32", starts()["olora_dora"]),
    ],
)
def test_resumed_equals_uninterrupted_from_every_tick_into_another_pack(load, tmp_path, family, dtype, job):
    base = load(family, dtype)
    whole = run_alone(base, job)
    num_ticks = 0
    mid_step_saves = 0

    engine = Engine(base, EngineConfig(token_budget=4096, job_tokens=1))  # one slice per tick; the solo run has several
    admit(engine, "job", job)
    before: list[Event] = []
    while not engine.idle:
        engine.save_checkpoint("job", tmp_path / f"{num_ticks}")
        mid_step_saves += engine._jobs["job"].tally.next_slice > 0
        vectors, after = finish_elsewhere(base, tmp_path / f"{num_ticks}", job)

        assert vectors == whole.vectors, f"saved after tick {num_ticks}"
        assert rename(before, "job") + rename(after, "job") == whole.events, f"saved after tick {num_ticks}"
        before += engine.tick()
        num_ticks += 1

    assert mid_step_saves >= 3


@pytest.mark.parametrize("job", [JOB, numbers()["early_best"]])
def test_resumed_equals_uninterrupted_after_the_last_step(load, tmp_path, job):
    base = load("llama")
    engine = Engine(base, EngineConfig())
    admit(engine, "job", job)
    while not engine.idle:
        engine.tick()
    engine.save_checkpoint("job", tmp_path / "done")

    vectors, events = finish_elsewhere(base, tmp_path / "done", job)

    assert vectors == state_bytes(engine, "job")
    assert [type(event).__name__ for event in events if event.job == "job"] == ["JobFinished"]


def test_saving_a_checkpoint_does_not_change_the_run(load, tmp_path):
    base = load("llama")
    whole = run_alone(base, JOB)

    engine = Engine(base, EngineConfig())
    admit(engine, "job", JOB)
    num_ticks = 0
    while not engine.idle:
        engine.tick()
        num_ticks += 1
        engine.save_checkpoint("job", tmp_path / f"{num_ticks}")

    assert state_bytes(engine, "job") == whole.vectors

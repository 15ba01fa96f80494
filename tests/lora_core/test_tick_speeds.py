"""What the engine learns of its own speed, and what it does to learn it."""

from __future__ import annotations

from lora_core.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.tick_speeds import TickSpeeds
from tests.lora_core.scenarios import config, dataset


def test_the_first_tick_of_a_size_is_forgotten_and_later_ones_are_averaged() -> None:
    speeds = TickSpeeds()
    for seconds in (10.0, 1.0, 2.0):
        speeds.learn(num_tokens=100, num_jobs=1, seconds=seconds)

    assert speeds.table() == {"alone": [(100, 90.0)], "together": []}


def test_a_size_of_which_only_the_first_tick_was_seen_is_not_told() -> None:
    speeds = TickSpeeds()
    speeds.learn(num_tokens=100, num_jobs=2, seconds=1)
    speeds.learn(num_tokens=300, num_jobs=2, seconds=1)
    speeds.learn(num_tokens=310, num_jobs=2, seconds=1)

    assert speeds.table()["together"] == [(310, 310.0)]


def test_of_each_size_the_wanted_number_of_ticks_goes_to_one_job_alone(load) -> None:
    engine = Engine(load("llama"), EngineConfig(token_budget=4096, max_tick_seconds=3600, ticks_alone=2))
    for job in ("a", "b"):
        engine.admit(job, config(num_steps=8, batch_size=1), dataset(seed=1, lengths=[20, 20]))

    steps = []
    for _ in range(4):
        engine.tick()
        steps.append(tuple(engine.progress(job)[0] for job in ("a", "b")))

    assert steps == [(1, 0), (1, 1), (2, 2), (3, 3)]

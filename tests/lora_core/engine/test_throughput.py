"""The engine's measurements of its own speed, and the ticks that it spends on them."""

from __future__ import annotations

from lora_core.engine.engine import Engine
from lora_core.engine.throughput import Throughput
from lora_core.engine_config import EngineConfig
from tests.lora_core.scenarios import config, dataset


def test_first_tick_of_a_size_is_ignored_and_later_ones_are_averaged() -> None:
    speeds = Throughput()
    for seconds in (10.0, 1.0, 2.0):
        speeds.record(num_tokens=100, fullest_lane=100, num_jobs=1, seconds=seconds)

    assert speeds.table() == {"alone": [(100, 90.0)], "together": []}


def test_rates_ignore_cold_ticks_once_a_warm_one_was_measured() -> None:
    speeds = Throughput()
    rates = []
    for num_tokens, seconds in ((100, 10.0), (100, 1.0), (500, 50.0), (500, 10.0)):
        speeds.record(num_tokens=num_tokens, fullest_lane=num_tokens // 2, num_jobs=1, seconds=seconds)
        rates.append((round(speeds.tokens_per_second, 3), round(speeds.lane_tokens_per_second, 3)))

    assert rates == [(10, 5), (100, 50), (100, 50), (90, 45)]


def test_size_with_only_a_first_tick_is_not_reported() -> None:
    speeds = Throughput()
    speeds.record(num_tokens=100, fullest_lane=100, num_jobs=2, seconds=1)
    speeds.record(num_tokens=300, fullest_lane=300, num_jobs=2, seconds=1)
    speeds.record(num_tokens=310, fullest_lane=310, num_jobs=2, seconds=1)

    assert speeds.table()["together"] == [(310, 310.0)]


def test_each_size_gets_the_configured_number_of_solo_ticks(load) -> None:
    engine = Engine(load("llama"), EngineConfig(token_budget=4096, max_tick_seconds=3600, ticks_alone=2))
    for job in ("a", "b"):
        engine.admit(job, config(num_steps=8, batch_size=1), dataset(seed=1, lengths=[20, 20]))

    steps = []
    for _ in range(4):
        engine.tick()
        steps.append(tuple(engine.progress(job)[0] for job in ("a", "b")))

    assert steps == [(1, 0), (1, 1), (2, 2), (3, 3)]

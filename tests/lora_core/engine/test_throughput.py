"""The engine's measurements of its own speed, and the ticks that it spends on them."""

from __future__ import annotations

from lora_core.engine.engine import Engine
from lora_core.engine.throughput import Throughput
from lora_core.engine_config import EngineConfig
from tests.lora_core.engine.test_prefix_cache import AMPLE, top
from tests.lora_core.scenarios import config, dataset


def test_first_tick_of_a_size_is_ignored_and_later_ones_are_averaged() -> None:
    speeds = Throughput()
    for seconds in (10.0, 1.0, 2.0):
        speeds.record(num_tokens=100, cost=100, fullest_lane=100, num_jobs=1, seconds=seconds)

    assert speeds.table() == {"alone": [(100, 90.0)], "together": []}


def test_rates_ignore_cold_ticks_once_a_warm_one_was_measured() -> None:
    speeds = Throughput()
    rates = []
    for num_tokens, seconds in ((100, 10.0), (100, 1.0), (500, 50.0), (500, 10.0)):
        speeds.record(num_tokens=num_tokens, cost=num_tokens, fullest_lane=num_tokens // 2, num_jobs=1, seconds=seconds)
        rates.append((round(speeds.tokens_per_second, 3), round(speeds.lane_tokens_per_second, 3)))

    assert rates == [(10, 5), (100, 50), (100, 50), (90, 45)]


def test_size_with_only_a_first_tick_is_not_reported() -> None:
    speeds = Throughput()
    speeds.record(num_tokens=100, cost=100, fullest_lane=100, num_jobs=2, seconds=1)
    speeds.record(num_tokens=300, cost=300, fullest_lane=300, num_jobs=2, seconds=1)
    speeds.record(num_tokens=310, cost=310, fullest_lane=310, num_jobs=2, seconds=1)

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


def test_cached_prefixes_do_not_count_as_higher_speed() -> None:
    speeds = Throughput()
    speeds.record(num_tokens=100, cost=100, fullest_lane=100, num_jobs=1, seconds=10)
    for cost in (100, 50, 25):
        speeds.record(num_tokens=100, cost=cost, fullest_lane=cost, num_jobs=1, seconds=cost / 200)

    assert speeds.table()["alone"] == [(100, 200.0)]


ROWS = dataset(seed=1, lengths=[20, 20, 20, 20])


def steps_of_ticks(engine: Engine, num_ticks: int) -> list[dict[str, int]]:
    """Return the completed steps of each job after each tick."""
    found = []
    for _ in range(num_ticks):
        engine.tick()
        found.append({job: engine.progress(job)[0] for job in engine.jobs()})
    return found


def test_jobs_with_cached_rows_share_ticks_after_the_solo_ticks(load) -> None:
    engine = Engine(load("llama"), EngineConfig(token_budget=4096, max_tick_seconds=3600, ticks_alone=1, **AMPLE))
    engine.admit("before", top(config(num_steps=2, batch_size=4)), ROWS)
    engine.tick()
    engine.evict("before")
    for job in ("a", "b"):
        engine.admit(job, top(config(num_steps=8, batch_size=2)), ROWS)

    steps = steps_of_ticks(engine, 3)

    assert steps == [{"a": 1, "b": 0}, {"a": 2, "b": 1}, {"a": 3, "b": 2}]
    assert engine.prefixes.computed_tokens == 80, "these two jobs compute no prefix"


def test_job_with_an_epoch_shorter_than_the_solo_ticks_shares_ticks(load) -> None:
    engine = Engine(load("llama"), EngineConfig(token_budget=4096, max_tick_seconds=3600, ticks_alone=3, **AMPLE))
    engine.admit("a", top(config(num_steps=8, batch_size=2)), ROWS)
    alone = steps_of_ticks(engine, 4)
    engine.admit("b", top(config(num_steps=8, batch_size=2)), ROWS)

    steps = steps_of_ticks(engine, 2)

    assert alone[-1] == {"a": 4}
    assert steps == [{"a": 5, "b": 1}, {"a": 6, "b": 2}]


def test_tick_on_cached_rows_is_measured_by_tokens_and_by_actual_work(load, monkeypatch) -> None:
    engine = Engine(load("llama"), EngineConfig(token_budget=4096, max_tick_seconds=3600, **AMPLE))
    engine.admit("a", top(config(num_steps=4, batch_size=2)), ROWS)
    measured: list[tuple[int, int]] = []
    monkeypatch.setattr(
        engine._throughput, "record", lambda **tick: measured.append((tick["num_tokens"], tick["cost"]))
    )

    steps_of_ticks(engine, 4)

    assert measured == [(40, 40), (40, 40), (40, 20), (40, 20)], "the upper of two blocks is half of the base"

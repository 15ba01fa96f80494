"""Scheduling is fair in tokens, starves no job and fills the token budget. Speeds of tick sizes are measured."""

from __future__ import annotations

from collections import Counter

from lora_core.config import Kind
from lora_core.engine.engine import Engine
from lora_core.engine.fair_queue import ReadySlice, select_slices, widen
from lora_core.engine.throughput import Throughput
from lora_core.engine_config import EngineConfig
from tests.lora_core.scenarios import config, dataset


def ready_slice(job: str, num_tokens: int, served: int = 0, kind: Kind = "train") -> ReadySlice:
    return ReadySlice(job=job, kind=kind, num_tokens=num_tokens, served=served)


def names(slices: list[ReadySlice]) -> list[str]:
    return [ready.job for ready in slices]


def test_all_slices_are_selected_if_all_fit():
    assert names(select_slices([ready_slice("a", 10), ready_slice("b", 20)], token_budget=30)) == ["a", "b"]


def test_empty_queue_selects_nothing():
    assert select_slices([], token_budget=10) == []


def test_slice_above_the_budget_runs_alone():
    assert names(select_slices([ready_slice("big", 99), ready_slice("small", 1, served=5)], token_budget=10)) == ["big"]


def test_least_served_job_is_first_and_smaller_slices_fill_the_budget():
    waiting = [
        ready_slice("a", 40, served=90),
        ready_slice("b", 70, served=0),
        ready_slice("c", 60, served=10),
        ready_slice("d", 25, served=80),
    ]
    assert names(select_slices(waiting, token_budget=100)) == ["b", "d"]


def test_an_evaluation_is_never_mixed_with_training():
    waiting = [
        ready_slice("a", 10, served=1),
        ready_slice("b", 10, served=0, kind="evaluate"),
        ready_slice("c", 10, 2, "evaluate"),
    ]
    assert names(select_slices(waiting, token_budget=100)) == ["b", "c"]


def test_large_and_small_jobs_get_similar_tokens_over_time():
    served = Counter({"large": 0, "small": 0, "tiny": 0})
    sizes = {"large": 900, "small": 200, "tiny": 30}
    for _ in range(3000):
        waiting = [ready_slice(job, sizes[job], served[job]) for job in served]
        for chosen in select_slices(waiting, token_budget=1000):
            served[chosen.job] += chosen.num_tokens
    # tiny runs in every tick where it fits next to others, so it is limited to one slice per tick
    assert min(served["large"], served["small"]) > 0.5 * max(served["large"], served["small"])
    assert served["tiny"] >= 30 * 2500


def test_tick_is_widened_up_to_the_limits_of_a_job():
    waiting = [ReadySlice(job="a", kind="train", num_tokens=10, served=0, further=(10,) * 9)]

    assert widen(waiting, token_budget=1000, job_tokens=1000) == [(10,) * 10]
    assert widen(waiting, token_budget=1000, job_tokens=45) == [(10,) * 4]
    assert widen(waiting, token_budget=1000, job_tokens=1000, job_slices=3) == [(10,) * 3]


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

"""Parts of a tick run on separate cores without any effect on results."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.engine.engine import Engine
from lora_core.engine.throughput import Throughput
from lora_core.engine_config import EngineConfig
from lora_core.runtime import cpu_lanes as lanes_module
from lora_core.runtime.cpu_lanes import MIN_LANE_TOKENS, Lanes, num_cores, split
from tests.lora_core.runtime.dtypes import DTYPES
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    run_alone,
    run_elastically,
    submissions,
)


@given(st.lists(st.integers(1, 2048), min_size=1, max_size=20), st.integers(1, 8))
def test_every_slice_is_in_one_lane_and_no_lane_is_empty_or_too_full(sizes: list[int], num_lanes: int) -> None:
    lanes = split(sizes, num_lanes=num_lanes)

    assert sorted(index for lane in lanes for index in lane) == list(range(len(sizes)))
    assert all(lanes)
    assert len(lanes) == max(1, min(num_lanes, len(sizes), sum(sizes) // MIN_LANE_TOKENS))
    fullest = max(sum(sizes[index] for index in lane) for lane in lanes)
    assert fullest <= sum(sizes) / len(lanes) + max(sizes)


def test_few_tokens_stay_in_one_lane() -> None:
    assert split([MIN_LANE_TOKENS // 2] * 2, num_lanes=4) == [[0, 1]]


def test_lanes_run_concurrently() -> None:
    meeting = threading.Barrier(3, timeout=30)

    def meet(part: int) -> int:
        meeting.wait()
        return part

    assert Lanes(3).run(meet, [0, 1, 2]) == [0, 1, 2]


@pytest.mark.parametrize("bad", [0, 2])
def test_failure_of_a_lane_is_raised_after_all_lanes_have_finished(bad: int) -> None:
    ended: list[int] = []
    others_may_end = threading.Event()

    def compute(part: int) -> None:
        if part == bad:
            others_may_end.set()
            raise torch.OutOfMemoryError("simulated")
        others_may_end.wait(30)
        ended.append(part)

    with pytest.raises(torch.OutOfMemoryError):
        Lanes(3).run(compute, [0, 1, 2])
    assert sorted(ended) == [part for part in (0, 1, 2) if part != bad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_solo_with_three_lanes(load, monkeypatch, family, dtype):
    monkeypatch.setattr(lanes_module, "MIN_LANE_TOKENS", 8)
    used = spy_on_lanes(monkeypatch)
    base = load(family, dtype)
    jobs = submissions(family)
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=4096, seed=1, victim="none", num_lanes=3)

    assert max(used) == 3
    assert {name: packed[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)


def spy_on_lanes(monkeypatch) -> list[int]:
    """Return a list that collects the number of parts of each tick."""
    used: list[int] = []
    run = Lanes.run

    def noted(self, compute, parts):
        used.append(len(parts))
        return run(self, compute, parts)

    monkeypatch.setattr(Lanes, "run", noted)
    return used


@pytest.mark.parametrize(("num_parts", "cores"), [(1, 5), (2, 2), (5, 1), (7, 1)])
def test_parts_share_the_cores_of_lanes_that_would_be_empty(num_parts: int, cores: int) -> None:
    lanes = Lanes(5)

    found = lanes.run(lambda _: num_cores(), range(num_parts))

    assert found == [cores] * num_parts
    assert num_cores() == 1


def test_cores_are_given_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        Lanes(2).run(lambda part: 1 // part, [0])

    assert num_cores() == 1


def test_a_slow_machine_still_fills_every_lane(load, monkeypatch):
    """A slice that takes longer than max_tick_seconds takes as long alone, so it keeps no other lane empty."""
    monkeypatch.setattr(lanes_module, "MIN_LANE_TOKENS", 8)
    used = spy_on_lanes(monkeypatch)
    engine = Engine(load("llama"), EngineConfig(token_budget=4096, max_tick_seconds=1e-9, num_lanes=2))
    for seed in (1, 2):
        job = config(seed=seed, num_steps=3)
        admit(engine, str(seed), Submission(config=job, train=dataset(1, [20, 20])))
    while not engine.idle:
        engine.tick()

    assert used == [2] * (1 + 3), "the probe at start, then every tick"


def measured_one_token_per_second(throughput: Throughput, **of_tick: object) -> None:
    throughput.lane_tokens_per_second = 1.0


def test_step_of_one_job_fills_every_lane_on_a_slow_machine(load, monkeypatch):
    """The second slice is larger than the first, so the first alone must not limit the tick."""
    monkeypatch.setattr(lanes_module, "MIN_LANE_TOKENS", 8)
    monkeypatch.setattr(Throughput, "record", measured_one_token_per_second)
    used = spy_on_lanes(monkeypatch)
    engine = Engine(load("llama"), EngineConfig(token_budget=4096, max_tick_seconds=1.0, num_lanes=2))
    job = replace(config(num_steps=8, batch_size=2), slice_tokens=30)
    admit(engine, "job", Submission(config=job, train=dataset(1, [20, 28])))
    while not engine.idle:
        engine.tick()

    assert used == [2] * (1 + 8), "the probe at start, then one tick for each step"

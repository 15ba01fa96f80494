"""A tick interrupted by a failure or by Ctrl-C does not affect its jobs: they end with the same bytes."""

import itertools
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from lora_core.adapter import initialization, optimizer
from lora_core.engine import engine as engine_module
from lora_core.engine import job as job_module
from lora_core.engine import step as passes_module
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadCheckpoint
from lora_core.events import Event
from lora_core.forward.generation import Prompts
from lora_core.runtime import cpu_lanes
from lora_core.runtime.cpu_lanes import Lanes
from lora_core.runtime.device_errors import interrupts_wait
from tests.lora_core.scenarios import Submission, admit, config, dataset, rename, run_alone, state_bytes

LONG = Submission(
    config=config(num_steps=3, batch_size=3, seed=1, slice_tokens=40, dropout=0.2, evaluate_every_steps=2),
    train=dataset(1, [20, 33, 15, 38]),
    valid=dataset(11, [14, 30, 22]),
)
SHORT = Submission(config=config(num_steps=5, seed=2), train=dataset(2, [12, 25, 9]))
JOBS = {"long": LONG, "short": SHORT}


class Failure(Exception):
    """Any kind of failure during a tick."""


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("error", [KeyboardInterrupt, Failure])
@pytest.mark.parametrize("num_lanes", [2, 1])
@pytest.mark.parametrize("part", ["run_training", "run_evaluation"])
def test_tick_interrupted_in_a_lane_changes_no_byte(load, monkeypatch, error, num_lanes, part):
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 8)
    base = load("llama")
    alone = {name: run_alone(base, job) for name, job in JOBS.items()}
    engine = Engine(base, EngineConfig(num_lanes=num_lanes, token_budget=64))
    for name, job in JOBS.items():
        admit(engine, name, job)
    run, num_passes = getattr(passes_module, part), itertools.count()

    def interrupted(*arguments):
        scores = run(*arguments)
        if next(num_passes) in (1, 5):
            raise error
        return scores

    monkeypatch.setattr(passes_module, part, interrupted)
    events, num_interrupted = run_to_the_end(engine, error)

    assert num_interrupted == 2
    for name, outcome in alone.items():
        assert (state_bytes(engine, name), rename(events, name)) == (outcome.vectors, outcome.events)


def run_to_the_end(engine: Engine, error: type[BaseException]) -> tuple[list[Event], int]:
    """Return all events, and the number of ticks that raised `error`."""
    events: list[Event] = []
    num_interrupted = 0
    while not engine.idle:
        try:
            events += engine.tick()
        except error:
            num_interrupted += 1
            assert num_interrupted < 10, "the tick fails forever"
            assert not any(job.adapter.g.any() for job in engine._jobs.values())
    return events, num_interrupted


def test_tick_interrupted_between_lanes_and_bookkeeping_changes_no_byte(load, monkeypatch):
    alone = run_alone(load("llama"), LONG)
    engine = Engine(load("llama"), EngineConfig(token_budget=64))
    admit(engine, "long", LONG)
    record, calls = engine.throughput.record, itertools.count()

    def interrupted(**measured):
        if next(calls) in (1, 5):
            raise KeyboardInterrupt
        record(**measured)

    monkeypatch.setattr(engine.throughput, "record", interrupted)
    events, num_interrupted = run_to_the_end(engine, KeyboardInterrupt)

    assert num_interrupted == 2
    assert (state_bytes(engine, "long"), rename(events, "long")) == (alone.vectors, alone.events)


def test_ctrl_c_during_an_update_waits_for_its_end(load, monkeypatch):
    alone = run_alone(load("llama"), SHORT)
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "short", SHORT)
    sqrt, is_first = torch.sqrt, [True]

    def pressed(*arguments, **options):
        """Press Ctrl-C when the first moment is updated and the weights are not."""
        if is_first:
            is_first.clear()
            signal.raise_signal(signal.SIGINT)
        return sqrt(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer.torch, "sqrt", pressed)
        with pytest.raises(KeyboardInterrupt):
            engine.tick()
    assert engine.progress("short") == (1, 5)
    events, _ = run_to_the_end(engine, KeyboardInterrupt)

    assert (state_bytes(engine, "short"), rename(events, "short")) == (alone.vectors, alone.events)


def test_interrupted_update_makes_only_its_own_job_unusable(load, monkeypatch, tmp_path):
    alone = run_alone(load("llama"), SHORT)
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "bad", replace(SHORT, config=replace(SHORT.config, seed=7)))
    admit(engine, "short", SHORT)
    bad, update = engine._jobs["bad"].adapter, job_module.optimizer_step

    def limited(adapter, *arguments, **options):
        if adapter is bad:
            adapter.m.fill_(1.0)
            raise Failure
        update(adapter, *arguments, **options)

    monkeypatch.setattr(job_module, "optimizer_step", limited)
    events, num_interrupted = run_to_the_end(engine, Failure)

    assert num_interrupted == 1
    assert engine.progress("bad") == (0, 5)
    assert (state_bytes(engine, "short"), rename(events, "short")) == (alone.vectors, alone.events)
    operations = (
        lambda: engine.save_checkpoint("bad", tmp_path / "checkpoint"),
        lambda: engine.export("bad", tmp_path / "adapter", base_name="base"),
        lambda: engine.generation({"bad": Prompts(prompts=((1,),), max_tokens=1)}),
    )
    for make in operations:
        with pytest.raises(BadCheckpoint, match="'bad' has undefined weights"):
            make()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
def test_interrupted_initialization_is_repeated(load, monkeypatch, error):
    lora = replace(SHORT.config.lora, init_lora_weights="pissa_niter_2")
    job = replace(SHORT, config=replace(SHORT.config, lora=lora))
    alone = run_alone(load("llama"), job)
    monkeypatch.setattr(engine_module, "START_WORK", 1)
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", job)
    engine.tick()
    with monkeypatch.context() as patch:
        patch.setattr(initialization, "_randomized_svd", raising(error))
        with pytest.raises(error):
            engine.tick()

    events, _ = run_to_the_end(engine, error)

    assert (state_bytes(engine, "job"), rename(events, "job")) == (alone.vectors, alone.events)


def raising(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_arguments, **_options):
        raise error

    return fail


def test_lanes_abandoned_by_two_interrupts_can_still_be_awaited(monkeypatch):
    lanes_of_two, may_end, ended = Lanes(2), threading.Event(), []

    def compute(part):
        if part == 0:
            raise KeyboardInterrupt
        may_end.wait(30)
        ended.append(part)

    with monkeypatch.context() as patch:
        patch.setattr(cpu_lanes, "wait", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lanes_of_two.run(compute, [0, 1])
    assert ended == []

    may_end.set()
    lanes_of_two.wait()

    assert ended == [1]


def test_failed_submission_of_a_part_leaves_no_other_part_unawaited(monkeypatch):
    lanes_of_three, ended = Lanes(3), []
    submit = ThreadPoolExecutor.submit

    def limited(pool, compute, part):
        if part == 2:
            raise RuntimeError("can't start new thread")
        return submit(pool, compute, part)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", limited)
    with pytest.raises(RuntimeError, match="thread"):
        lanes_of_three.run(ended.append, [0, 1, 2])
    lanes_of_three.wait()

    assert ended == [1]


def test_ctrl_c_waits_for_the_end_of_a_block_and_no_longer():
    done = []

    def block():
        with interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            done.append("in the block")
        done.append("after the block")

    with pytest.raises(KeyboardInterrupt):
        block()

    assert done == ["in the block"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

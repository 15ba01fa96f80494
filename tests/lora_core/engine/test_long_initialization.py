"""A long initialization runs between the ticks of other jobs and changes no bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_core.adapter import flat_adapter
from lora_core.adapter.initialization import DRAWING_WORK
from lora_core.base_model.model import BaseModel
from lora_core.engine import engine
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import OutOfMemory
from lora_core.events import Event, JobFinished, JobStepped
from tests.lora_core.scenarios import Submission, admit, config, dataset, run_alone, state_bytes

SHORT = config(num_steps=3)
LONG = config(num_steps=40, seed=1)
PLAIN = Submission(config=LONG, train=dataset(2, [12, 7, 30]))


def beginning(init: str) -> Submission:
    return Submission(
        config=replace(SHORT, lora=replace(SHORT.lora, init_lora_weights=init)), train=dataset(1, [20, 33, 15])
    )


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initialize one weight per tick."""
    monkeypatch.setattr(engine, "START_WORK", 1)


def ticked(training: Engine, until: str) -> list[Event]:
    """Return all events until job `until` has finished."""
    events: list[Event] = []
    while not any(isinstance(event, JobFinished) and event.job == until for event in events):
        events += training.tick()
    return events


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian"])
def test_packmates_train_during_an_initialization_with_unchanged_bytes(load, monkeypatch, init, dtype) -> None:
    base: BaseModel = load("llama", dtype)
    expected = {"slow": run_alone(base, beginning(init)), "plain": run_alone(base, PLAIN)}
    monkeypatch.setattr(engine, "START_WORK", 1)
    training = Engine(base, EngineConfig())
    admit(training, "plain", PLAIN)
    admit(training, "slow", beginning(init))

    events = ticked(training, "slow")
    slow = state_bytes(training, "slow")
    ticked(training, "plain")

    steps = [event.job for event in events if isinstance(event, JobStepped)]
    assert steps.index("slow") >= len(base.linear_names()) - 1  # one weight per tick, the first one at admission
    assert slow == expected["slow"].vectors
    assert state_bytes(training, "plain") == expected["plain"].vectors


def test_tick_draws_no_more_numbers_than_its_work_allows(load, monkeypatch) -> None:
    training = Engine(load("llama"), EngineConfig())
    monkeypatch.setattr(engine, "START_WORK", 1000 * DRAWING_WORK)
    initial_a, drawn = flat_adapter.initial_a, []

    def counted(*arguments, **options):
        a_RD = initial_a(*arguments, **options)
        drawn[-1].append(a_RD.numel())
        return a_RD

    monkeypatch.setattr(flat_adapter, "initial_a", counted)

    drawn.append([])
    admit(training, "slow", beginning("default"))
    while drawn[-1]:
        drawn.append([])
        training.tick()

    assert len(drawn) > 2
    assert all(sum(numbers) - numbers[-1] < 1000 for numbers in drawn[:-1])


def test_engine_is_not_idle_during_an_initialization(load, in_small_pieces) -> None:
    training = Engine(load("llama"), EngineConfig())

    admit(training, "slow", beginning("pissa"))

    assert not training.idle
    assert training.tick() == []
    assert training.progress("slow") == (0, 3)


def test_job_saved_during_its_initialization_resumes_from_there(load, in_small_pieces, tmp_path: Path) -> None:
    base: BaseModel = load("llama")
    submission = beginning("pissa_niter_2")
    training = Engine(base, EngineConfig())
    admit(training, "slow", submission)
    training.tick()

    training.save_checkpoint("slow", tmp_path / "saved")
    training.evict("slow")
    admit(training, "slow", submission, resume_from=tmp_path / "saved")
    ticked(training, "slow")

    assert state_bytes(training, "slow") == run_alone(base, submission).vectors


@pytest.mark.parametrize("fails_at", [1, 5])
def test_out_of_memory_in_an_initialization_fails_only_that_job(
    load, in_small_pieces, monkeypatch, fails_at: int
) -> None:
    training = Engine(load("llama"), EngineConfig())
    admit(training, "plain", PLAIN)
    decomposed, calls = flat_adapter.decomposed, []

    def run_out(*arguments, **options):
        calls.append(1)
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("no room")
        return decomposed(*arguments, **options)

    monkeypatch.setattr(flat_adapter, "decomposed", run_out)

    def join() -> None:
        admit(training, "slow", beginning("pissa"))
        ticked(training, "slow")

    with pytest.raises(OutOfMemory, match="Job 'slow' is out of memory: its initialization does not fit") as caught:
        join()

    assert caught.value.job == "slow"
    assert "pissa_niter_4" in caught.value.remedy
    assert training.jobs() == (("plain",) if fails_at == 1 else ("plain", "slow"))
    ticked(training, "plain")

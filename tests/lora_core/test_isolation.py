"""One job's ruin stays its own: its packmates can't tell that it was ever there."""

from dataclasses import replace

import pytest
import torch

from lora_core import job as job_module
from lora_core.adapters import AdapterRow
from lora_core.config import EngineConfig
from lora_core.engine import Engine
from lora_core.errors import OutOfMemory
from lora_core.events import JobDiverged, JobFinished, JobStepped
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    preferences,
    rename,
    run_alone,
    state_bytes,
    submissions,
    weights,
)

GOOD = Submission(config=config(num_steps=6, seed=1), train=dataset(1, [20, 33, 15]))


@pytest.mark.parametrize("learning_rate", [1e3, 1e30, 1e38])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_absurd_learning_rate_quarantines_its_job_alone(load, dtype, learning_rate):
    base = load("llama", dtype)
    alone = run_alone(base, GOOD)
    absurd = config(num_steps=60, seed=2, learning_rate=learning_rate)
    bad = Submission(config=replace(absurd, optimizer=replace(absurd.optimizer, weight_decay=0.1)), train=GOOD.train)

    engine = Engine(base, EngineConfig())
    admit(engine, "bad", bad)
    admit(engine, "good", GOOD)
    events = []
    while not engine.idle:
        events += engine.tick()

    assert state_bytes(engine, "good") == alone.vectors
    assert rename(events, "good") == alone.events
    diverged = [event for event in events if isinstance(event, JobDiverged)]
    if learning_rate > 1e3:
        assert [event.job for event in diverged] == ["bad"]
    assert torch.isfinite(weights(engine, "bad")).all()


def test_pairs_of_nan_reach_no_packmate_that_learns_from_pairs_too(load):
    base, pairs = load("llama"), preferences()["dpo"]
    alone = run_alone(base, pairs)

    engine = Engine(base, EngineConfig())
    admit(engine, "bad", preferences()["orpo"])
    admit(engine, "good", pairs)
    weights(engine, "bad").fill_(float("nan"))
    events = []
    while not engine.idle:
        events += engine.tick()

    assert [event.job for event in events if isinstance(event, JobDiverged)] == ["bad"]
    assert (state_bytes(engine, "good"), rename(events, "good")) == (alone.vectors, alone.events)


def test_a_row_of_nan_reaches_no_packmate_and_the_job_can_be_evicted(load):
    base = load("gpt2")
    alone = run_alone(base, GOOD)

    engine = Engine(base, EngineConfig())
    admit(engine, "bad", Submission(config=config(seed=3), train=GOOD.train))
    admit(engine, "good", GOOD)
    weights(engine, "bad").fill_(float("nan"))
    events = engine.tick()
    engine.evict("bad")
    while not engine.idle:
        events += engine.tick()

    assert [event.job for event in events if isinstance(event, JobDiverged)] == ["bad"]
    assert state_bytes(engine, "good") == alone.vectors


def test_running_out_of_memory_splits_the_tick_and_changes_no_result(load, monkeypatch):
    base = load("llama")
    jobs = submissions("llama")
    alone = {name: run_alone(base, job) for name, job in jobs.items()}
    limit_token_memory(monkeypatch, num_tokens=176)

    engine = Engine(base, EngineConfig(token_budget=4096))
    for name, job in jobs.items():
        admit(engine, name, job)
    while not engine.idle:
        engine.tick()

    assert {name: state_bytes(engine, name) for name in jobs} == {
        name: outcome.vectors for name, outcome in alone.items()
    }


def test_a_slice_that_does_not_fit_alone_fails_its_job_and_no_other(load, monkeypatch):
    base = load("llama")
    alone = run_alone(base, GOOD)
    limit_token_memory(monkeypatch, num_tokens=96)

    engine = Engine(base, EngineConfig())
    admit(engine, "long", Submission(config=config(batch_size=1, seed=3), train=dataset(3, [120])))
    admit(engine, "good", GOOD)
    errors = []
    while not engine.idle:
        try:
            engine.tick()
        except OutOfMemory as error:
            errors.append(error)

    assert [error.job for error in errors] == ["long"]
    assert "max_length" in errors[0].remedy
    assert state_bytes(engine, "good") == alone.vectors


def limit_token_memory(monkeypatch, *, num_tokens: int) -> None:
    """A device that fails in the backward, when gradients are partial already, above so many tokens."""
    from lora_core import engine

    def limited(run):
        def wrapper(base, pack):
            scores = run(base, pack)
            if pack.input_ids.shape[1] > num_tokens:
                raise torch.OutOfMemoryError("simulated")
            return scores

        return wrapper

    monkeypatch.setattr(engine, "run_training", limited(engine.run_training))
    monkeypatch.setattr(engine, "run_evaluation", limited(engine.run_evaluation))


def out_of_memory(*_arguments, **_options):
    raise torch.OutOfMemoryError("simulated")


def test_a_job_whose_row_does_not_fit_is_refused_and_changes_nothing(load, monkeypatch):
    alone = run_alone(load("llama"), GOOD)
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "good", GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterRow, "initialise", out_of_memory)
        with pytest.raises(OutOfMemory, match="The adapter of job 'large'") as caught:
            admit(engine, "large", GOOD)
    assert (caught.value.job, engine.jobs()) == ("large", ("good",))
    while not engine.idle:
        engine.tick()
    assert state_bytes(engine, "good") == alone.vectors


@pytest.mark.parametrize("position", ["first", "last"])
def test_a_job_whose_update_does_not_fit_ends_alone_and_no_event_of_a_packmate_is_lost(load, monkeypatch, position):
    alone = run_alone(load("llama"), GOOD)
    engine = Engine(load("llama"), EngineConfig(token_budget=4096))
    for name in ("large", "good") if position == "first" else ("good", "large"):
        admit(engine, name, GOOD)
    large = engine._jobs["large"].row
    update = job_module.optimizer_step

    def limited(row, *arguments, **options):
        return out_of_memory() if row is large else update(row, *arguments, **options)

    monkeypatch.setattr(job_module, "optimizer_step", limited)
    events, errors = [], []
    while not engine.idle:
        try:
            events += engine.tick()
        except OutOfMemory as error:
            errors.append(error.job)
            engine.evict(error.job)

    assert errors == ["large"]
    assert state_bytes(engine, "good") == alone.vectors
    assert rename(events, "good") == alone.events


def test_an_export_that_does_not_fit_is_said_of_its_job(load, monkeypatch, tmp_path):
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", GOOD)
    monkeypatch.setattr("lora_core.export.packed_logits", out_of_memory)
    with pytest.raises(OutOfMemory) as caught:
        engine.export("job", tmp_path / "adapter", base_name="tiny")
    assert caught.value.job == "job"
    assert list(tmp_path.iterdir()) == []


def test_a_tick_grows_again_after_memory_was_short_for_a_while(load, monkeypatch):
    engine = Engine(load("llama"), EngineConfig(token_budget=200))
    jobs = {f"job-{index}": Submission(config=config(num_steps=60), train=dataset(index, [20])) for index in range(3)}
    for name, job in jobs.items():
        admit(engine, name, job)
    with monkeypatch.context() as patch:
        limit_token_memory(patch, num_tokens=64)
        while not any(isinstance(event, JobStepped) for event in engine.tick()):
            pass
    events = engine.tick()
    assert len({event.job for event in events}) == 1

    while len({event.job for event in events}) < 3 and not engine.idle:
        events = engine.tick()

    assert {event.job for event in events} == jobs.keys()


def test_finished_jobs_stay_until_evicted_and_leave_the_engine_idle(load):
    engine = Engine(load("llama"), EngineConfig())
    assert engine.idle
    assert engine.tick() == []
    admit(engine, "job", GOOD)
    assert engine.progress("job") == (0, 6)
    events = []
    while not engine.idle:
        events += engine.tick()

    assert events[-1] == JobFinished(job="job", step=6, kept_step=6)
    assert engine.jobs() == ("job",)
    assert engine.num_parameters("job") > 0
    assert engine.memory()["rows_bytes"] == 16 * engine.num_parameters("job")
    assert engine.tokens_per_second() > 0
    engine.evict("job")
    assert engine.jobs() == ()
    assert engine.memory()["rows_bytes"] == 0

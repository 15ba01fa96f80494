"""A diverged job or one that runs out of memory has no effect on its packmates."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from lora_core.base_model.model import load_base
from lora_core.config import LoraConfig, OptimizerConfig
from lora_core.engine import job as job_module
from lora_core.engine import job_start
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import OutOfMemory
from lora_core.events import JobDiverged, JobFinished, JobStepped
from lora_core.runtime import cpu_lanes
from tests.lora_core.scenarios import (
    Outcome,
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


GOOD_PAIRS = preferences()["dpo"]


def rated(learning_rate: float, **options) -> Submission:
    job = config(num_steps=60, seed=2, learning_rate=learning_rate)
    return Submission(config=replace(job, optimizer=replace(job.optimizer, **options)), train=GOOD.train)


def scaled(**options) -> Submission:
    return replace(GOOD, config=replace(GOOD.config, lora=LoraConfig(rank=4, alpha=1e40, **options)))


def with_weights_of_nan(engine: Engine) -> None:
    adapter = engine._jobs["bad"].adapter
    adapter.p[7] = float("nan")
    adapter.refresh_compute()  # in bf16, passes read the rounded weights


def with_an_infinite_gradient(engine: Engine) -> None:
    engine._jobs["bad"].adapter.g[7] = float("inf")


def as_it_is(engine: Engine) -> None:
    pass


RUINS = {
    "weights": (GOOD, with_weights_of_nan),
    "gradient": (GOOD, with_an_infinite_gradient),
    "pairs": (preferences()["orpo"], with_weights_of_nan),
    "adamw at 1e30": (rated(1e30, weight_decay=0.1), as_it_is),
    "adamw at 1e38 unclipped": (rated(1e38, max_grad_norm=None), as_it_is),
    "adamw at 1e9 with a constant loss": (rated(1e9, weight_decay=0.0), as_it_is),
    "sgd at 1e30": (rated(1e30, kind="sgd", momentum=0.9), as_it_is),
    "sgd at 1e300": (rated(1e300, kind="sgd", max_grad_norm=1e-30), as_it_is),
    "adafactor at 1e30": (rated(1e30, kind="adafactor", weight_decay=0.1), as_it_is),
    "alpha of 1e40": (scaled(), as_it_is),
    "alpha of 1e40 with DoRA": (scaled(use_dora=True), as_it_is),
    "alpha of 1e40 with PiSSA": (scaled(init_lora_weights="pissa"), as_it_is),
}


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(("num_lanes", "dtype"), [(1, "float32"), (2, "bfloat16")])
@pytest.mark.parametrize("ruin", RUINS)
def test_ruined_job_ends_as_diverged_and_does_not_affect_packmates(load, solo, monkeypatch, ruin, num_lanes, dtype):
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 8)
    bad, damage = RUINS[ruin]

    engine = Engine(load("llama", dtype), EngineConfig(num_lanes=num_lanes))
    for name, job in {"rows": GOOD, "bad": bad, "pairs": GOOD_PAIRS}.items():
        admit(engine, name, job)
    damage(engine)
    events = []
    while not engine.idle:
        events += engine.tick()

    assert [event.job for event in events if isinstance(event, JobDiverged)] == ["bad"]
    assert not [event for event in events if isinstance(event, JobFinished) and event.job == "bad"]
    for name in ("rows", "pairs"):
        assert (state_bytes(engine, name), rename(events, name)) == (
            solo[dtype, name].vectors,
            solo[dtype, name].events,
        )


@pytest.fixture(scope="module")
def solo(base_dirs) -> dict[tuple[str, str], Outcome]:
    """Outcomes of solo runs of the good jobs of a pack."""
    torch.set_num_threads(1)
    outcomes = {}
    for dtype in ("float32", "bfloat16"):
        base = load_base(base_dirs["llama"], dtype=dtype, device="cpu")
        outcomes[dtype, "rows"], outcomes[dtype, "pairs"] = run_alone(base, GOOD), run_alone(base, GOOD_PAIRS)
    return outcomes


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_diverged_job_resumes_from_its_last_completed_step(load, tmp_path, optimizer):
    job = replace(GOOD, config=replace(GOOD.config, optimizer=OptimizerConfig(kind=optimizer, learning_rate=1e-2)))
    undisturbed = run_alone(load("llama"), job)
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "bad", job)
    while engine.progress("bad")[0] < 3:
        engine.tick()
    last_good = state_bytes(engine, "bad")

    with_an_infinite_gradient(engine)
    events = engine.tick()
    engine.save_checkpoint("bad", tmp_path / "checkpoint")

    assert [(type(event), event.step) for event in events] == [(JobDiverged, 3)]
    resumed = Engine(load("llama"), EngineConfig())
    admit(resumed, "job", job, resume_from=tmp_path / "checkpoint")
    assert (resumed.progress("job"), state_bytes(resumed, "job")) == ((3, 6), last_good)
    while not resumed.idle:
        resumed.tick()
    assert state_bytes(resumed, "job") == undisturbed.vectors


@pytest.mark.parametrize("ruin", [name for name in RUINS if " at 1e" in name])
def test_checkpoint_of_a_diverged_job_can_be_loaded_at_any_learning_rate(load, tmp_path, ruin):
    job, _ = RUINS[ruin]
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "bad", job)
    events = []
    while not engine.idle:
        events += engine.tick()

    engine.save_checkpoint("bad", tmp_path / "checkpoint")

    resumed = Engine(load("llama"), EngineConfig())
    admit(resumed, "bad", job, resume_from=tmp_path / "checkpoint")
    assert isinstance(events[-1], JobDiverged)
    assert resumed.progress("bad")[0] == events[-1].step
    assert state_bytes(resumed, "bad") == state_bytes(engine, "bad")


@pytest.mark.parametrize(("learning_rate", "ending"), [(1e1, JobFinished), (1e3, JobDiverged)])
def test_high_learning_rate_ends_a_job_only_if_it_ruins_the_weights(load, learning_rate, ending):
    engine = Engine(load("llama", "bfloat16"), EngineConfig())
    admit(engine, "bad", rated(learning_rate, weight_decay=0.1))
    events = []
    while not engine.idle:
        events += engine.tick()

    *steps, last = events
    assert isinstance(last, ending)
    assert last.step == len(steps)
    assert sum(event.grad_norm > 0 for event in steps) > len(steps) / 2  # chaotic: the norm of some may underflow
    assert any(event.grad_norm > 0 for event in steps[-10:])
    assert (len(steps) == 60) == (ending is JobFinished)
    assert torch.isfinite(weights(engine, "bad")).all()


def test_nan_weights_reach_no_packmate_and_the_job_can_be_evicted(load):
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


def test_out_of_memory_splits_the_tick_and_changes_no_result(load, monkeypatch):
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


def test_slice_that_does_not_fit_alone_fails_only_its_job(load, monkeypatch):
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


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_failed_tick_releases_its_activations_at_once(load, monkeypatch, num_jobs):
    """With two jobs the next tick is smaller, and no error is raised yet."""
    from lora_core.engine import step as passes

    kept: list[weakref.ref] = []

    def failing(base, pack):
        activations = torch.zeros(1000)
        kept.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("simulated")

    engine = Engine(load("llama"), EngineConfig())
    for number in range(num_jobs):
        admit(engine, f"good {number}", GOOD)
    monkeypatch.setattr(passes, "run_training", failing)
    gc.disable()  # a reference cycle would only be found by the collector
    try:
        with pytest.raises(OutOfMemory) if num_jobs == 1 else nullcontext():
            engine.tick()
    finally:
        gc.enable()

    assert kept
    assert all(reference() is None for reference in kept)


def limit_token_memory(monkeypatch, *, num_tokens: int) -> None:
    """Simulate a device that runs out of memory above `num_tokens`, after the backward has changed gradients."""
    from lora_core.engine import step as passes

    def limited(run):
        def wrapper(base, pack):
            scores = run(base, pack)
            if pack.input_ids.shape[1] > num_tokens:
                raise torch.OutOfMemoryError("simulated")
            return scores

        return wrapper

    monkeypatch.setattr(passes, "run_training", limited(passes.run_training))
    monkeypatch.setattr(passes, "run_evaluation", limited(passes.run_evaluation))


def out_of_memory(*_arguments, **_options):
    raise torch.OutOfMemoryError("simulated")


def test_job_whose_adapter_does_not_fit_is_rejected_without_side_effects(load, monkeypatch):
    alone = run_alone(load("llama"), GOOD)
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "good", GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(job_start, "FlatAdapter", out_of_memory)
        with pytest.raises(OutOfMemory, match="Job 'large' is out of memory: its adapter") as caught:
            admit(engine, "large", GOOD)
    assert (caught.value.job, engine.jobs()) == ("large", ("good",))
    while not engine.idle:
        engine.tick()
    assert state_bytes(engine, "good") == alone.vectors


@pytest.mark.parametrize("position", ["first", "last"])
def test_job_whose_update_does_not_fit_fails_alone_and_no_event_is_lost(load, monkeypatch, position):
    alone = run_alone(load("llama"), GOOD)
    engine = Engine(load("llama"), EngineConfig(token_budget=4096))
    for name in ("large", "good") if position == "first" else ("good", "large"):
        admit(engine, name, GOOD)
    large = engine._jobs["large"].adapter
    update = job_module.optimizer_step

    def limited(adapter, *arguments, **options):
        return out_of_memory() if adapter is large else update(adapter, *arguments, **options)

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


def test_out_of_memory_in_an_export_names_its_job(load, monkeypatch, tmp_path):
    engine = Engine(load("llama"), EngineConfig())
    admit(engine, "job", GOOD)
    monkeypatch.setattr("lora_core.peft_format.export.packed_logits", out_of_memory)
    with pytest.raises(OutOfMemory) as caught:
        engine.export("job", tmp_path / "adapter", base_name="tiny")
    assert caught.value.job == "job"
    assert list(tmp_path.iterdir()) == []


def test_tick_grows_again_after_a_temporary_memory_shortage(load, monkeypatch):
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
    assert engine.job("job").adapter.num_parameters > 0
    assert engine.memory()["adapter_bytes"] == 16 * engine.job("job").adapter.num_parameters
    assert engine.throughput.tokens_per_second > 0
    engine.evict("job")
    assert engine.jobs() == ()
    assert engine.memory()["adapter_bytes"] == 0

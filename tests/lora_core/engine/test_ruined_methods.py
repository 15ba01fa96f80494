"""A ruined job of any method does not affect its packmates: DoRA magnitudes, a head, embeddings, KTO, a classifier.

Each pack also has a sound job of the same method and a plain one. Their bytes equal those of their solo runs.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.config import OptimizerConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobDiverged
from lora_core.runtime import cpu_lanes
from tests.lora_core.classifiers import classification_jobs, classifier
from tests.lora_core.scenarios import (
    Outcome,
    Submission,
    admit,
    methods,
    preferences,
    rename,
    run_alone,
    state_bytes,
    submissions,
    trained_in_full,
)

NAN = float("nan")
PLACES: dict[str, Callable[[FlatAdapter], slice]] = {
    "A": lambda adapter: slice(7, 8),
    "magnitudes": lambda adapter: slice(adapter.num_ab, adapter.num_ab + 1),
    "in full": lambda adapter: slice(adapter.num_lora, adapter.num_parameters),
}
WHERE = {"dora": "magnitudes", "head": "in full", "tokens": "in full", "kto": "A", "three": "in full", "reward": "A"}
ABSURD = OptimizerConfig(learning_rate=1e30, weight_decay=0.1)


def spoil(engine: Engine, place: str) -> None:
    """Set one value, or a whole tensor, to NaN where forward and backward read it."""
    adapter = engine._jobs["bad"].adapter
    adapter.p[PLACES[place](adapter)] = NAN
    adapter.refresh_compute()


def at_an_absurd_rate(job: Submission) -> Submission:
    schedule = replace(job.config.schedule, kind="constant", warmup_steps=0, num_steps=9)
    return replace(job, config=replace(job.config, optimizer=ABSURD, schedule=schedule, num_steps=9))


@pytest.fixture(scope="module")
def alone() -> Callable[[str, str, BaseModel, Submission], Outcome]:
    known: dict[tuple[str, str], Outcome] = {}

    def outcome(key: str, name: str, base: BaseModel, job: Submission) -> Outcome:
        if (key, name) not in known:
            known[key, name] = run_alone(base, job)
        return known[key, name]

    return outcome


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory) -> Callable[[str], BaseModel]:
    folder = tmp_path_factory.mktemp("classifiers")
    return lambda dtype: classifier("bert", folder / "bert", dtype)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("is_absurd", [False, True], ids=["nan", "absurd rate"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16")])
@pytest.mark.parametrize("method", ["dora", "head", "tokens", "kto"])
def test_ruined_job_of_any_method_does_not_affect_its_packmates(
    load, alone, monkeypatch, method, family, dtype, is_absurd
):
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 8)
    base = load(family, dtype)
    job = {**methods(), **trained_in_full(family), **preferences()}[method]
    mates = {"mate": job, "plain": submissions(family)["plain"]}

    run = pack_with_a_ruin(base, job, mates, WHERE[method], is_absurd=is_absurd, num_lanes=2)

    expected = {name: alone(f"{family} {method}", name, base, mate) for name, mate in mates.items()}
    assert_only_the_ruin_has_ended(run, expected)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("is_absurd", [False, True], ids=["nan", "absurd rate"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["three", "reward"])
def test_ruined_classifier_does_not_affect_its_packmates(classifiers, alone, monkeypatch, method, dtype, is_absurd):
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 8)
    base = classifiers(dtype)
    jobs = classification_jobs(with_types=True)
    mates = {"mate": jobs[method], "plain": jobs["many"]}

    run = pack_with_a_ruin(base, jobs[method], mates, WHERE[method], is_absurd=is_absurd, num_lanes=1)

    expected = {name: alone(f"bert {dtype} {method}", name, base, mate) for name, mate in mates.items()}
    assert_only_the_ruin_has_ended(run, expected)


def pack_with_a_ruin(
    base: BaseModel, job: Submission, mates: dict[str, Submission], place: str, *, is_absurd: bool, num_lanes: int
) -> tuple[Engine, list[Event]]:
    """Return the engine after all jobs have ended, and its events. The ruined job is the middle one of the pack."""
    engine = Engine(base, EngineConfig(num_lanes=num_lanes))
    first, *others = mates
    admit(engine, first, mates[first])
    admit(engine, "bad", at_an_absurd_rate(job) if is_absurd else job)
    for name in others:
        admit(engine, name, mates[name])
    if not is_absurd:
        spoil(engine, place)
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    return engine, events


def assert_only_the_ruin_has_ended(run: tuple[Engine, list[Event]], expected: dict[str, Outcome]) -> None:
    engine, events = run
    assert [event.job for event in events if isinstance(event, JobDiverged)] == ["bad"]
    for name, outcome in expected.items():
        assert rename(events, name) == outcome.events, name
        assert state_bytes(engine, name) == outcome.vectors, name

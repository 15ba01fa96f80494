"""Invariant: however jobs join, leave, pause and move between engines, each ends with the bytes of its solo run.

Some jobs diverge. Alone and in a pack, they diverge at the same step, with the bytes of their last completed step.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from lora_core.base_model.model import BaseModel
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobDiverged, JobFinished
from lora_core.runtime import cpu_lanes
from tests.lora_core.drawn_jobs import drawn_job
from tests.lora_core.scenarios import Submission, admit, rename, state_bytes

BASES = [(family, dtype) for family in ("llama", "gpt2") for dtype in ("float32", "bfloat16")]
MAX_JOBS = 8
FEW_KINDS, MANY_KINDS = 8, 60
BOUNDED = settings(
    max_examples=7,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LARGE = settings(
    BOUNDED, phases=[Phase.generate, Phase.shrink], max_examples=20, stateful_step_count=30, derandomize=False
)

engine_configs = st.builds(
    EngineConfig, token_budget=st.sampled_from([4096, 60, 4096, 1]), num_lanes=st.sampled_from([1, 2, 3])
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Exported files by name (none for a diverged job), the bytes of weights and optimizer state, and the events."""

    files: dict[str, bytes]
    state: bytes
    events: tuple[Event, ...]


@dataclass(kw_only=True, slots=True)
class Course:
    """State of one job: the engine that holds it or its checkpoint, and the events so far."""

    submission: Submission
    engine: int | None
    checkpoint: Path | None = None
    events: list[Event] = field(default_factory=list)


class SoloRuns:
    """Results of uninterrupted solo runs, computed once for all examples. Without `exports` they have no files."""

    def __init__(self, load: Callable[..., BaseModel], *, exports: bool = True) -> None:
        self.load = load
        self.exports = exports
        self._results: dict[tuple[str, str, str], Result] = {}

    def of(self, family: str, dtype: str, submission: Submission) -> Result:
        key = (family, dtype, repr(submission))
        if key not in self._results:
            self._results[key] = self._run(self.load(family, dtype), submission)
        return self._results[key]

    def _run(self, base: BaseModel, submission: Submission) -> Result:
        engine = Engine(base, EngineConfig(token_budget=4096))
        admit(engine, "job", submission)
        events: list[Event] = []
        while not engine.idle:
            events += engine.tick()
        return self.result_of(engine, "job", events)

    def result_of(self, engine: Engine, job: str, events: list[Event]) -> Result:
        is_exported = self.exports and isinstance(events[-1], JobFinished)
        files = exported(engine, job) if is_exported else {}
        return Result(files=files, state=state_bytes(engine, job), events=rename(events, job))


def exported(engine: Engine, job: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        engine.export(job, Path(folder) / "adapter", base_name="tiny")
        return {path.name: path.read_bytes() for path in (Path(folder) / "adapter").iterdir()}


class Trainers(RuleBasedStateMachine):
    """Two engines on one loaded base. `courses` contains the unfinished jobs."""

    alone: SoloRuns
    num_kinds: int
    """Number of distinct jobs to draw from. Each distinct job that is drawn costs a solo run."""
    draw = staticmethod(drawn_job)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.courses: dict[str, Course] = {}
        self.num_named = 0

    @initialize(base=st.sampled_from(BASES), configs=st.tuples(engine_configs, engine_configs))
    def start(self, base: tuple[str, str], configs: tuple[EngineConfig, ...]) -> None:
        self.begin(base, configs)

    def begin(self, base: tuple[str, str], configs: tuple[EngineConfig, ...]) -> None:
        self.family, self.dtype = base
        self.base = self.alone.load(*base)
        self.engines = [Engine(self.base, config) for config in configs]

    def resident(self, engine: int | None = None) -> list[str]:
        return [
            name for name, course in self.courses.items() if course.engine in ({0, 1} if engine is None else {engine})
        ]

    def paused(self) -> list[str]:
        return [name for name, course in self.courses.items() if course.engine is None]

    @precondition(lambda self: len(self.courses) < MAX_JOBS)
    @rule(data=st.data(), num_jobs=st.integers(2, 5), engine=st.integers(0, 1))
    def submit(self, data: st.DataObject, num_jobs: int, engine: int) -> None:
        for _ in range(num_jobs):
            submission = self.draw(self.family, data.draw(st.integers(0, self.num_kinds - 1)))
            self.num_named += 1
            name = f"job{self.num_named}"
            admit(self.engines[engine], name, submission)
            self.courses[name] = Course(submission=submission, engine=engine)

    @precondition(lambda self: self.resident())
    @rule(num_ticks=st.integers(1, 4), engine=st.integers(0, 1))
    def tick(self, num_ticks: int, engine: int) -> None:
        for _ in range(num_ticks):
            self.take(engine, self.engines[engine].tick())

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.resident()))
        self.engine_of(name).evict(name)
        del self.courses[name]

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        self.park(data.draw(st.sampled_from(self.resident())))

    @precondition(lambda self: self.paused())
    @rule(data=st.data(), engine=st.integers(0, 1))
    def resume(self, data: st.DataObject, engine: int) -> None:
        self.unpark(data.draw(st.sampled_from(self.paused())), engine)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), engine=st.integers(0, 1), config=engine_configs)
    def restart(self, data: st.DataObject, engine: int, config: EngineConfig) -> None:
        """Replace an engine by one that resumes its jobs in another order, with another budget and other lanes."""
        names = data.draw(st.permutations(self.resident(engine)))
        for name in names:
            self.park(name)
        self.engines[engine] = Engine(self.base, config)
        for name in names:
            self.unpark(name, engine)

    def engine_of(self, name: str) -> Engine:
        where = self.courses[name].engine
        assert where is not None
        return self.engines[where]

    def park(self, name: str) -> None:
        course = self.courses[name]
        course.checkpoint = self.folder / f"{name}-{len(list(self.folder.iterdir()))}"
        self.engine_of(name).save_checkpoint(name, course.checkpoint)
        self.engine_of(name).evict(name)
        course.engine = None

    def unpark(self, name: str, engine: int) -> None:
        course = self.courses[name]
        admit(self.engines[engine], name, course.submission, resume_from=course.checkpoint)
        course.engine = engine

    def take(self, engine: int, events: list[Event]) -> None:
        for event in events:
            course = self.courses[event.job]
            course.events.append(event)
            if isinstance(event, JobFinished | JobDiverged):
                found = self.alone.result_of(self.engines[engine], event.job, course.events)
                self.engines[engine].evict(event.job)
                del self.courses[event.job]
                self.compare(course.submission, found)

    def compare(self, submission: Submission, found: Result) -> None:
        note(f"{self.family} in {self.dtype}: {submission.config}")
        alone = self.alone.of(self.family, self.dtype, submission)
        assert found.events == alone.events
        assert found.state == alone.state
        assert found.files == alone.files

    def teardown(self) -> None:
        """Resume all remaining jobs and run them to their end."""
        try:
            for index, name in enumerate(self.paused()):
                self.unpark(name, index % 2)
            while not all(engine.idle for engine in self.engines):
                for engine in (0, 1):
                    self.take(engine, self.engines[engine].tick())
            assert not self.courses
        finally:
            shutil.rmtree(self.folder)


@pytest.fixture
def alone(load, monkeypatch) -> SoloRuns:
    """Solo runs with a low minimum of tokens per lane, so that tiny jobs are spread over lanes."""
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 16)
    bases = {base: load(*base) for base in BASES}
    return SoloRuns(lambda family, dtype: bases[family, dtype])


def trainers(alone_: SoloRuns, num_kinds_: int) -> type[Trainers]:
    class Bound(Trainers):
        alone = alone_
        num_kinds = num_kinds_

    return Bound


def test_any_sequence_of_operations_gives_the_bytes_of_solo_runs(alone):
    run_state_machine_as_test(trainers(alone, FEW_KINDS), settings=BOUNDED)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_long_sequences_of_operations_give_the_bytes_of_solo_runs(alone):
    run_state_machine_as_test(trainers(alone, MANY_KINDS), settings=LARGE)

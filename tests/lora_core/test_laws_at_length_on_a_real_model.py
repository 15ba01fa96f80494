"""Long tests on a real model: fifty steps as in PEFT, a ruined packmate, a stop at each step, random operations."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from lora_core.base_model.model import BaseModel, load_base
from lora_core.config import JobConfig, LoraConfig, ScheduleConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobDiverged
from lora_core.runtime import cpu_lanes
from tests.lora_core.drawn_jobs import drawn_job
from tests.lora_core.engine.test_engine_state_machine import BOUNDED, FEW_KINDS, SoloRuns, Trainers, engine_configs
from tests.lora_core.engine.test_ruined_methods import at_an_absurd_rate, spoil
from tests.lora_core.peft_format.test_peft_parity import assert_equal_to_peft
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    methods,
    rename,
    run_alone,
    state_bytes,
    text_dataset,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

MATES = {
    "dora": Submission(config=methods()["dora"].config, train=dataset(10, [13, 4, 29, 18])),
    "evaluated": Submission(
        config=config(rank=16, dropout=0.1, num_steps=3, seed=1, evaluate_every_steps=1, slice_tokens=30),
        train=dataset(1, [21, 27, 33]),
        valid=dataset(10, [19, 8]),
    ),
}
STOPPED = Submission(
    config=config(rank=8, dropout=0.1, num_steps=4, seed=3, evaluate_every_steps=2, slice_tokens=30),
    train=dataset(3, [22, 35, 9, 14, 28]),
    valid=dataset(4, [17]),
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request, real_base_dir) -> BaseModel:
    return load_base(real_base_dir, dtype=request.param, device="cpu")


def job_of(method: str) -> JobConfig:
    """Return a job of `method` at a learning rate whose rounding errors stay within the tolerances.

    At 2e-4 the losses match too, but with rsLoRA one number in millions is off by 1.1e-4. AdamW divides each gradient
    by its own size. So a gradient that is only rounding gives as large an update as any other, proportional to the
    learning rate. With LoRA+, B has the higher learning rate, here 1.6e-4. At 4e-4, four of fifty losses were off by
    1.06e-5.
    """
    plain = config(rank=4, num_steps=50, seed=7, learning_rate=1e-4)
    plain = replace(plain, schedule=ScheduleConfig(kind="cosine", warmup_steps=3, num_steps=50))
    if method == "lora_plus":
        return replace(plain, optimizer=replace(plain.optimizer, learning_rate=2e-5, lora_plus_ratio=8.0))
    options = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(method, {})
    return replace(plain, lora=replace(plain.lora, **options))


@pytest.mark.parametrize("method", ["lora", "rslora", "lora_plus", "dora"])
def test_fifty_steps_of_each_method_equal_peft_on_a_real_model(real_base_dir, tmp_path, method):
    def load(_family: str) -> BaseModel:
        return load_base(real_base_dir, dtype="float32", device="cpu")

    assert_equal_to_peft(load, "llama", job_of(method), tmp_path, text_dataset(real_base_dir))


@pytest.mark.parametrize("ruin", ["nan", "absurd rate", "infinite scale"])
def test_diverged_job_does_not_change_its_packmates_on_a_real_model(base, alone, monkeypatch, ruin):
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 16)
    bad = replace(MATES["evaluated"], valid=None)  # diverges in training, together with the others
    if ruin == "absurd rate":
        bad = at_an_absurd_rate(bad)
    if ruin == "infinite scale":
        bad = replace(bad, config=replace(bad.config, lora=LoraConfig(rank=4, alpha=1e40)))
    engine = Engine(base, EngineConfig(num_lanes=2))
    for name, job in {"dora": MATES["dora"], "bad": bad, "evaluated": MATES["evaluated"]}.items():
        admit(engine, name, job)
    if ruin == "nan":
        spoil(engine, "A")
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()

    assert [event.job for event in events if isinstance(event, JobDiverged)] == ["bad"]
    for name in MATES:
        assert rename(events, name) == alone[name].events, name
        assert state_bytes(engine, name) == alone[name].vectors, name


@pytest.fixture(scope="module")
def alone(base):
    return {name: run_alone(base, job) for name, job in {**MATES, "stopped": STOPPED}.items()}


def test_job_resumed_after_any_step_gives_the_same_bytes_on_a_real_model(base, alone, tmp_path):
    """The job resumes in another pack, whose ticks take one slice. The first stop is in the middle of a step."""
    whole, before = alone["stopped"], []
    engine = Engine(base, EngineConfig(token_budget=4096, job_tokens=1))
    admit(engine, "job", STOPPED)
    saved = -1
    while not engine.idle:
        before += engine.tick()
        if engine.progress("job")[0] == saved or engine.idle:
            continue
        saved = engine.progress("job")[0]
        engine.save_checkpoint("job", tmp_path / f"{saved}")
        other = Engine(base, EngineConfig(token_budget=30))
        admit(other, "mate", MATES["dora"])
        admit(other, "job", STOPPED, resume_from=tmp_path / f"{saved}")
        after: list[Event] = []
        while other.progress("job")[0] < 4 or not other.idle:
            after += other.tick()

        assert state_bytes(other, "job") == whole.vectors, saved
        assert rename(before, "job") + rename(after, "job") == whole.events, saved
    assert saved == 4  # an evaluation still follows step 4


def affordable_job(family: str, number: int) -> Submission:
    """Return the drawn job without decompositions of all weights and without a head as large as this base's."""
    job = drawn_job(family, number)
    lora = replace(job.config.lora, modules_to_save=())
    if lora.subtracts_start:
        lora = replace(lora, target_modules="layers.1.self_attn.o_proj")
    return replace(job, config=replace(job.config, lora=lora))


def test_random_operations_give_the_bytes_of_solo_runs_on_a_real_model(real_base_dir, monkeypatch):
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 16)
    base = load_base(real_base_dir, dtype="bfloat16", device="cpu")

    class OnARealModel(Trainers):
        alone = SoloRuns(lambda _family, _dtype: base, exports=False)
        num_kinds = FEW_KINDS
        draw = staticmethod(affordable_job)

        @initialize(configs=st.tuples(engine_configs, engine_configs))
        def start(self, configs: tuple[EngineConfig, ...]) -> None:
            self.begin(("llama", "bfloat16"), configs)

    run_state_machine_as_test(OnARealModel, settings=settings(BOUNDED, max_examples=3, stateful_step_count=8))

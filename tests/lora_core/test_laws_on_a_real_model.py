"""Packed equals solo and resumed equals uninterrupted on a real language model, with methods mixed in one pack."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_core.base_model.model import BaseModel, load_base
from lora_core.config import ObjectiveConfig, OptimizerConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event
from tests.lora_core.scenarios import (
    Outcome,
    Submission,
    admit,
    config,
    dataset,
    rename,
    run_alone,
    run_elastically,
    state_bytes,
)

STEPS_BEFORE_THE_MOVE = 1


def mixed_jobs() -> dict[str, Submission]:
    """LoRA with dropout, evaluations and several slices per step; DoRA with LoRA+; preference pairs; OLoRA; SGD."""
    lora = config(rank=16, dropout=0.1, num_steps=2, seed=1, evaluate_every_steps=1, slice_tokens=48)
    dora = config(rank=5, targets=("q_proj", "down_proj"), num_steps=2, seed=2)
    dpo = config(rank=8, num_steps=2, seed=3, objective=ObjectiveConfig(kind="dpo", beta=0.5))
    olora = config(rank=4, targets=("v_proj",), num_steps=2, seed=4, learning_rate=1e-3)
    sgd = config(rank=2, batch_size=3, num_steps=3, seed=5)
    return {
        "lora": Submission(config=lora, train=dataset(1, [41, 27, 33]), valid=dataset(10, [19, 8])),
        "dora": Submission(
            config=replace(
                dora,
                lora=replace(dora.lora, use_dora=True),
                optimizer=replace(dora.optimizer, lora_plus_ratio=4.0),
            ),
            train=dataset(2, [31, 13, 22]),
        ),
        "dpo": Submission(config=dpo, train=dataset(3, [12, 17, 24, 9])),
        "olora": Submission(
            config=replace(olora, lora=replace(olora.lora, init_lora_weights="olora")), train=dataset(4, [7, 29])
        ),
        "sgd": Submission(
            config=replace(sgd, optimizer=OptimizerConfig(kind="sgd", learning_rate=0.1, momentum=0.9)),
            train=dataset(5, [2, 15, 38]),
        ),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_pack_gives_the_bytes_of_solo_runs_even_if_moved_midway(real_base_dir, tmp_path, dtype):
    base = load_base(real_base_dir, dtype=dtype, device="cpu")
    jobs = mixed_jobs()
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=4096, seed=1, victim="none", num_lanes=2)
    moved = run_and_move(base, jobs, tmp_path)

    assert {name: packed[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)
    assert {name: moved[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)


def run_and_move(base: BaseModel, jobs: dict[str, Submission], folder: Path) -> dict[str, Outcome]:
    """Run each job in one pack for its first step, then in a second pack from its checkpoint."""
    first, second = Engine(base, EngineConfig()), Engine(base, EngineConfig(token_budget=64))
    events: list[Event] = []
    for name, job in jobs.items():
        admit(first, name, job)
    while first.jobs():
        events += first.tick()
        for name in first.jobs():
            if first.progress(name)[0] == STEPS_BEFORE_THE_MOVE:
                first.save_checkpoint(name, folder / name)
                first.evict(name)
    for name, job in jobs.items():
        admit(second, name, job, resume_from=folder / name)
    while not second.idle:
        events += second.tick()
    return {name: Outcome(vectors=state_bytes(second, name), events=rename(events, name)) for name in jobs}

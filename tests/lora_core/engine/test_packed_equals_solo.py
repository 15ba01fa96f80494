"""Invariant: the result of a job does not depend on the other jobs in the pack."""

from collections.abc import Callable

import pytest
import torch

from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobFinished, JobStepped
from tests.lora_core.runtime.dtypes import DTYPES
from tests.lora_core.scenarios import (
    Outcome,
    Submission,
    config,
    dataset,
    run_alone,
    run_elastically,
    submissions,
)


@pytest.fixture(scope="module")
def solo_runs() -> dict[tuple[str, str], dict[str, Outcome]]:
    """Outcomes of solo runs of `submissions`, by family and dtype, computed once for all tests here."""
    return {}


@pytest.fixture
def alone(load, solo_runs) -> Callable[[str, str], dict[str, Outcome]]:
    def outcomes(family: str, dtype: str) -> dict[str, Outcome]:
        if (family, dtype) not in solo_runs:
            base = load(family, dtype)
            solo_runs[family, dtype] = {name: run_alone(base, job) for name, job in submissions(family).items()}
        return solo_runs[family, dtype]

    return outcomes


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(
    ("family", "dtype", "token_budget"),
    [  # all pairs of any two parameters; test_engine_state_machine.py draws from all
        ("llama", "bfloat16", 96),
        ("llama", "float32", 1),
        ("llama", "bfloat16", 4096),
        ("gpt2", "float32", 96),
        ("gpt2", "float32", 4096),
        ("gpt2", "bfloat16", 1),
    ],
)
def test_packed_equals_solo_bit_for_bit_under_joins_leaves_and_evictions(load, alone, family, dtype, token_budget):
    base = load(family, dtype)
    jobs = submissions(family)
    expected = alone(family, dtype)

    packed = run_elastically(base, jobs, token_budget=token_budget, seed=token_budget, victim="plain")
    packed |= run_elastically(base, jobs, token_budget=token_budget, seed=token_budget + 1, victim="tiny")

    assert packed.keys() == jobs.keys()
    for name, outcome in packed.items():
        assert outcome.events == expected[name].events, name
        assert outcome.vectors == expected[name].vectors, name


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gpt2", "float32")])
def test_each_job_has_a_gradient_at_every_step_and_finishes(alone, family, dtype):
    """At usual learning rates no job looks diverged (lora_core/engine/divergence.py), whatever it trains."""
    for name, outcome in alone(family, dtype).items():
        *others, last = outcome.events
        assert isinstance(last, JobFinished), name
        assert min(event.grad_norm for event in others if isinstance(event, JobStepped)) > 0, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_solo_with_two_threads_if_sizes_are_multiples_of_64(load, dtype):
    torch.set_num_threads(2)
    base = load("llama", dtype)
    jobs = submissions("llama")
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=4096, seed=1, victim="plain")

    assert {name: outcome.vectors == alone[name].vectors for name, outcome in packed.items()} == {
        name: True for name in jobs if name != "plain"
    }


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_solo_among_forty_others(load, alone, family):
    base = load(family, "bfloat16")
    crowd = {f"{name}-{index}": job for name, job in submissions(family).items() for index in range(2)}

    packed = run_elastically(base, crowd, token_budget=512, seed=3, victim="none")

    assert packed.keys() == crowd.keys()
    for name, outcome in packed.items():
        assert outcome == alone(family, "bfloat16")[name.rpartition("-")[0]], name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_packed_equals_solo_on_a_real_model_with_a_bitwise_probe(real_base_dir):
    base = load_base(real_base_dir, dtype="bfloat16", device="cpu")
    jobs = {
        "long": Submission(config=config(rank=16, num_steps=2, seed=1), train=dataset(1, [301, 222, 97])),
        "odd": Submission(
            config=config(rank=5, targets=("q_proj", "down_proj"), dropout=0.1, num_steps=2, seed=2),
            train=dataset(2, [61, 13, 149]),
        ),
        "small": Submission(config=config(rank=32, batch_size=1, num_steps=3, seed=3), train=dataset(3, [7, 45])),
    }
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    for seed in (1, 2):
        packed = run_elastically(base, jobs, token_budget=4096, seed=seed, victim="none")
        assert {name: packed[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)
    assert Engine(base, EngineConfig()).invariance == "bitwise"

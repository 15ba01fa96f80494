"""Law: what else was in the pack can't be seen in the result."""

import pytest
import torch

from tests.lora_core.scenarios import run_alone, run_elastically, submissions


@pytest.mark.parametrize("token_budget", [1, 96, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_solo_bit_for_bit_under_joins_leaves_and_evictions(load, family, dtype, token_budget):
    base = load(family, dtype)
    jobs = submissions(family)
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=token_budget, seed=token_budget, victim="plain")
    packed |= run_elastically(base, jobs, token_budget=token_budget, seed=token_budget + 1, victim="tiny")

    assert packed.keys() == jobs.keys()
    for name, outcome in packed.items():
        assert outcome.events == alone[name].events, name
        assert outcome.vectors == alone[name].vectors, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_equals_solo_with_two_threads_where_sizes_are_multiples_of_64(load, dtype):
    torch.set_num_threads(2)
    base = load("llama", dtype)
    jobs = submissions("llama")
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=4096, seed=1, victim="plain")

    assert {name: outcome.vectors == alone[name].vectors for name, outcome in packed.items()} == {
        name: True for name in jobs if name != "plain"
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_solo_beside_twenty_others(load, family):
    base = load(family, "bfloat16")
    jobs = submissions(family)
    crowd = {f"{name}-{index}": job for name, job in jobs.items() for index in range(4)}

    packed = run_elastically(base, crowd, token_budget=512, seed=3, victim="none")

    for name, job in jobs.items():
        alone = run_alone(base, job)
        for index in range(4):
            assert packed[f"{name}-{index}"] == alone, name

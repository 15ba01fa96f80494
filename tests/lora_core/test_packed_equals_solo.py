"""Law: what else was in the pack can't be seen in the result."""

import pytest
import torch

from lora_core.config import EngineConfig
from lora_core.engine import Engine
from lora_core.events import JobDiverged
from tests.lora_core.scenarios import admit, config, dataset, run_alone, run_elastically, state_bytes, submissions, Submission


@pytest.mark.parametrize("token_budget", [1, 96, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_solo_bit_for_bit_under_joins_leaves_and_evictions(load, family, dtype, token_budget):
    base = load(family, dtype)
    jobs = submissions(family)
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=token_budget, seed=token_budget, victim="plain")
    packed |= run_elastically(base, jobs, token_budget=token_budget, seed=token_budget + 1, victim="tiny")

    assert packed.keys() >= jobs.keys()
    for name, outcome in packed.items():
        assert outcome.events == alone[name].events, name
        assert outcome.vectors == alone[name].vectors, name

"""Each part of a step's profile contains the operations that it names, on a tiny base."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.contenders.engine import iter_events, job_config
from benchmarks.step_profile import BY_FUNCTION, events_of, profile_of
from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import JobStepped
from tests import tiny_base
from tests.lora_core.scenarios import submissions

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def stepping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    base = load_base(tiny_base.make(tmp_path_factory.mktemp("tiny") / "base"), dtype="float32", device="cpu")
    engine = Engine(base, EngineConfig(batch_invariant=False))  # one matmul per linear on every CPU
    rows = next(iter(submissions("llama").values())).train
    engine.admit("job", job_config({"rank": 4, "batch_size": 2}), rows)
    events = iter_events(engine)

    def step() -> JobStepped:
        return next(event for event in events if isinstance(event, JobStepped))

    step()
    return base, step


def test_lora_and_base_parts_contain_the_matmuls_of_their_own_linears(stepping: tuple[Any, Any]) -> None:
    events, _, _ = events_of(*stepping)

    products = Counter(part for part, event in events if event.name in PRODUCTS)
    forward = NUM_LAYERS * 7
    unwanted = 3  # the input of the lowest q, k and v needs no gradient
    assert products["base matmuls"] == 2 * forward - unwanted
    # Forward: x A once for q, k and v, once for gate and up, once each for o and down; h B for each of the seven.
    # Backward: dy B and dB for each of the seven; dA and dx as often as x A.
    assert products["LoRA"] == NUM_LAYERS * (4 + 7 + 2 * 7 + 2 * 4) - 1
    assert products["linears: other operations"] == 0


def test_custom_autograd_functions_are_in_their_part_in_both_directions(stepping: tuple[Any, Any]) -> None:
    events, _, _ = events_of(*stepping)

    found = {event.name: set[str]() for _, event in events}
    for part, event in events:
        found[event.name].add(part)
    for node, part in {
        "AddRmsNorm": "norms",
        "RmsNorm": "norms",
        "SwiGlu": "gated activation",
        "Rotate": "RoPE",
        "MatrixAttention": "attention",
    }.items():
        assert found[node] == {part}
        assert found[f"{node}Backward"] == {part}


def test_the_parts_add_up_to_the_step_and_none_is_empty(stepping: tuple[Any, Any]) -> None:
    parts, whole, _ = profile_of(*stepping)

    assert sum(parts.values()) == pytest.approx(whole, rel=1e-6)
    expected = {"base matmuls", "linears: other operations", "LoRA", "attention", "RoPE", "norms", "gated activation"}
    expected |= {"head and loss", "optimizer", "data and bookkeeping", "Python and additions between parts"}
    assert set(parts) - {"copies outside all parts"} == expected
    assert all(seconds > 0 for seconds in parts.values())


def test_every_profiled_function_exists() -> None:
    names = {
        name
        for module, content in list(sys.modules.items())
        if module.startswith(("lora_core", "transformers.models"))
        for name, value in list(vars(content).items())
        if callable(value)
    }

    assert set(BY_FUNCTION) - names == set()

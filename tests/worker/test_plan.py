"""From what was asked for to what the engine is told."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from catalog.memory import SLICE_TOKENS, TICK_TOKENS
from catalog.spec import JobRequest, JobSpec, resolve
from lora_core.config import MAX_DROPOUT, LoraConfig
from lora_core.optim import learning_rate_at
from worker.plan import engine_config, job_config


def request(**fields: object) -> JobRequest:
    return JobRequest.model_validate({"model": "tiny", "training_file": "file-1", **fields})


@pytest.mark.parametrize("num_steps", [1, 2, 40, 1000])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.99])
def test_the_first_step_of_any_job_learns_and_some_step_has_the_peak_rate(num_steps: int, ratio: float) -> None:
    spec = resolve(request(schedule={"warmup_ratio": ratio}), num_rows=100, max_positions=None, seed=1)

    schedule = job_config(spec, num_steps=num_steps, evaluate_every_steps=None).schedule

    rates = [learning_rate_at(step, peak=1.0, schedule=schedule) for step in range(1, num_steps + 1)]
    assert rates[0] > 0
    assert max(rates) == 1


def test_the_largest_dropout_that_may_be_asked_for_is_the_engines() -> None:
    spec = resolve(request(lora={"dropout": MAX_DROPOUT}), num_rows=100, max_positions=None, seed=1)

    assert job_config(spec, num_steps=1, evaluate_every_steps=None).lora.dropout == MAX_DROPOUT
    with pytest.raises(ValidationError, match="dropout"):
        request(lora={"dropout": MAX_DROPOUT + 0.01})


def test_the_shape_of_an_adapter_reaches_the_engine_whatever_the_order_of_its_keys() -> None:
    lora = {
        "rank": 4,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1, 0],
        "rank_pattern": {"up_proj": 8, "q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "use_dora": True,
    }
    turned = lora | {"rank_pattern": {"q_proj": 2, "up_proj": 8}, "layers_to_transform": [0, 1]}
    configs = []
    for shape in (lora, turned):
        asked = request(lora=shape, optimizer={"lora_plus_ratio": 16})
        spec = resolve(asked, num_rows=100, max_positions=None, seed=1)
        configs.append(job_config(spec, num_steps=1, evaluate_every_steps=None))

    assert configs[0].digest() == configs[1].digest()
    assert configs[0].optimizer.lora_plus_ratio == 16
    assert configs[0].lora == LoraConfig(
        rank=4,
        alpha=8,
        target_modules=("q_proj", "up_proj"),
        layers_to_transform=(0, 1),
        rank_pattern=(("q_proj", 2), ("up_proj", 8)),
        alpha_pattern=(("q_proj", 3),),
        use_dora=True,
    )


def test_a_spec_of_before_patterns_still_loads() -> None:
    spec = resolve(request(), num_rows=100, max_positions=None, seed=1)
    old = spec.model_dump(mode="json")
    for name in ("layers_to_transform", "rank_pattern", "alpha_pattern", "use_dora"):
        del old["lora"][name]
    del old["optimizer"]["lora_plus_ratio"]

    assert JobSpec.model_validate(old) == spec


def test_the_engine_makes_slices_and_ticks_of_the_sizes_that_memory_is_counted_with() -> None:
    spec = resolve(request(), num_rows=100, max_positions=None, seed=1)

    assert job_config(spec, num_steps=1, evaluate_every_steps=None).slice_tokens == SLICE_TOKENS
    budgets = {
        kind: engine_config(device, num_threads=2).token_budget for kind, device in (("cpu", "cpu"), ("cuda", "cuda:0"))
    }
    assert budgets == TICK_TOKENS


def test_every_core_of_a_cpu_is_a_lane_and_a_gpu_has_one() -> None:
    assert engine_config("cpu", num_threads=3).num_lanes == 3
    assert engine_config("cuda:0", num_threads=3).num_lanes == 1

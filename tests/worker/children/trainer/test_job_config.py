"""The engine gets the accepted configuration, and submission counts the parameters that the engine adapts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from catalog.resources import memory
from catalog.resources.memory import (
    FURTHER_SLICES,
    MOST_JOB_TOKENS,
    SLICE_TOKENS,
    TICK_TOKENS,
    BaseModelMemory,
    JobMemory,
)
from catalog.spec import target_modules
from catalog.spec.job import FleetDefaults, JobRequest, JobSpec, resolve
from catalog.spec.methods import MethodType, compares_with_start
from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.adapter.optimizer import learning_rate_at
from lora_core.base_model.model import describe_base
from lora_core.base_model.patching import choose_targets, find_linears
from lora_core.config import MAX_DROPOUT, EarlyStoppingConfig, LoraConfig, ObjectiveConfig, OptimizerConfig
from lora_core.engine_config import EngineConfig
from worker.children.trainer.job_config import engine_config, job_config


def request(**fields: object) -> JobRequest:
    return JobRequest.model_validate({"model": "tiny", "training_file": "file-1", **fields})


@pytest.mark.parametrize("num_steps", [1, 2, 40, 1000])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.99])
def test_a_learning_rate_is_positive_from_step_1_and_reaches_its_peak(num_steps: int, ratio: float) -> None:
    spec = resolve(request(schedule={"warmup_ratio": ratio}), num_rows=100, max_positions=None, seed=1)

    schedule = job_config(spec, num_steps=num_steps, evaluate_every_steps=None).schedule

    rates = [learning_rate_at(step, peak=1.0, schedule=schedule) for step in range(1, num_steps + 1)]
    assert rates[0] > 0
    assert max(rates) == 1


@pytest.mark.parametrize("num_steps", [1, 2, 3, 40, 1000])
def test_wsd_decays_over_its_fraction_of_the_steps_after_the_warm_up(num_steps: int) -> None:
    requested = {"type": "wsd", "warmup_ratio": 0.7, "decay_ratio": 0.3}
    spec = resolve(request(schedule=requested), num_rows=100, max_positions=None, seed=1)

    schedule = job_config(spec, num_steps=num_steps, evaluate_every_steps=None).schedule

    assert schedule.decay_steps == min(num_steps - schedule.warmup_steps, math.ceil(0.3 * num_steps))
    rates = [learning_rate_at(step, peak=1.0, schedule=schedule) for step in range(1, num_steps + 1)]
    assert min(rates) > 0


def test_wsd_decays_over_a_fifth_of_the_steps_by_default() -> None:
    spec = resolve(request(schedule={"type": "wsd"}), num_rows=100, max_positions=None, seed=1)

    assert job_config(spec, num_steps=100, evaluate_every_steps=None).schedule.decay_steps == 20


def test_optimizer_and_early_stopping_reach_the_engine() -> None:
    requested = request(
        optimizer={"type": "sgd", "momentum": 0.9, "learning_rate": 0.1},
        early_stopping={"patience": 3, "min_delta": 0.5},
        validation_file="file-2",
    )
    config = job_config(
        resolve(requested, num_rows=100, max_positions=None, seed=1), num_steps=9, evaluate_every_steps=2
    )

    assert (config.optimizer.kind, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.early_stopping, config.keep) == (EarlyStoppingConfig(patience=3, min_delta=0.5), "best")


def test_adafactor_hyperparameters_reach_the_engine() -> None:
    requested = {
        "type": "adafactor",
        "learning_rate": 0.1,
        "beta2_decay": -0.5,
        "clip_threshold": 2,
        "scale_floor": 0.05,
    }

    spec = resolve(request(optimizer=requested), num_rows=10, max_positions=None, seed=1)

    found = job_config(spec, num_steps=2, evaluate_every_steps=None).optimizer
    assert found == OptimizerConfig(
        kind="adafactor", learning_rate=0.1, beta2_decay=-0.5, clip_threshold=2, scale_floor=0.05
    )


@pytest.mark.parametrize(
    ("method", "numbers", "objective", "neftune_alpha"),
    [
        ("supervised", {"label_smoothing": 0.1, "neftune_alpha": 5}, {"label_smoothing": 0.1}, 5),
        ("dpo", {"label_smoothing": 0.2, "beta": 0.3}, {"label_smoothing": 0.2, "beta": 0.3}, 0),
    ],
)
def test_hyperparameters_of_a_method_reach_the_engine(
    method: str, numbers: dict[str, float], objective: dict[str, float], neftune_alpha: float
) -> None:
    requested = request(method={"type": method, method: {"hyperparameters": numbers}})

    config = job_config(
        resolve(requested, num_rows=100, max_positions=None, seed=1), num_steps=9, evaluate_every_steps=2
    )

    assert config.objective == ObjectiveConfig(kind=method, **objective)  # pyright: ignore[reportArgumentType]
    assert config.neftune_alpha == neftune_alpha


def test_the_largest_dropout_of_a_request_is_the_engines() -> None:
    spec = resolve(request(lora={"dropout": MAX_DROPOUT}), num_rows=100, max_positions=None, seed=1)

    assert job_config(spec, num_steps=1, evaluate_every_steps=None).lora.dropout == MAX_DROPOUT
    with pytest.raises(ValidationError, match="dropout"):
        request(lora={"dropout": MAX_DROPOUT + 0.01})


def test_the_adapter_configuration_does_not_depend_on_key_order() -> None:
    lora = {
        "rank": 4,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1, 0],
        "rank_pattern": {"up_proj": 8, "q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "use_dora": True,
        "init_lora_weights": "pissa_niter_4",
    }
    turned = lora | {"rank_pattern": {"q_proj": 2, "up_proj": 8}, "layers_to_transform": [0, 1]}
    configs = []
    for shape in (lora, turned):
        requested = request(lora=shape, optimizer={"lora_plus_ratio": 16})
        spec = resolve(requested, num_rows=100, max_positions=None, seed=1)
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
        init_lora_weights="pissa_niter_4",
    )


@pytest.mark.parametrize("slice_tokens", SLICE_TOKENS.values())
def test_slices_have_the_size_of_the_accepted_job_on_every_device(slice_tokens: int) -> None:
    given = FleetDefaults(slice_tokens=slice_tokens)
    spec = resolve(request(), num_rows=100, max_positions=None, seed=1, fleet_defaults=given)

    assert job_config(spec, num_steps=1, evaluate_every_steps=None).slice_tokens == slice_tokens
    assert FleetDefaults.of(spec) == FleetDefaults(precision=spec.precision, slice_tokens=slice_tokens)


def test_specs_without_a_slice_size_have_that_of_cpus() -> None:
    spec = resolve(request(), num_rows=100, max_positions=None, seed=1)
    old = {name: value for name, value in spec.model_dump(mode="json").items() if name != "slice_tokens"}

    assert JobSpec.model_validate(old) == spec
    assert spec.slice_tokens == FleetDefaults().slice_tokens == SLICE_TOKENS["cpu"]


def test_ticks_have_the_sizes_of_the_memory_estimate() -> None:
    cpu, gpu = engine_of("cpu", num_threads=2), engine_of("cuda:0", num_threads=2)

    assert {"cpu": cpu.job_tokens, "cuda": gpu.job_tokens} == MOST_JOB_TOKENS
    assert {kind: 2 * tokens for kind, tokens in SLICE_TOKENS.items()} == MOST_JOB_TOKENS
    assert gpu.job_tokens <= gpu.token_budget
    assert cpu.job_slices == gpu.job_slices == 1 + FURTHER_SLICES
    assert (cpu.token_budget, gpu.token_budget) == (2 * TICK_TOKENS["cpu"], TICK_TOKENS["cuda"])


def test_a_cpu_has_one_lane_per_core_and_a_gpu_has_one() -> None:
    assert engine_of("cpu", num_threads=3).num_lanes == 3
    assert engine_of("cuda:0", num_threads=3).num_lanes == 1


def engine_of(device: str, *, num_threads: int) -> EngineConfig:
    return engine_config({"device": device, "batch_invariant": True}, num_threads=num_threads)


@pytest.mark.parametrize("method", get_args(MethodType))
def test_the_catalog_and_the_engine_agree_which_methods_need_a_reference(method: MethodType) -> None:
    assert compares_with_start(method) == ObjectiveConfig(kind=method).needs_reference


SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | HEADS,
    "gemma3_text": SIZES | HEADS | {"head_dim": 16},
    "phi3": SIZES | HEADS | {"pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 64},
    "gpt_neox": SIZES | {"num_attention_heads": 4},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32, "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3}
    | {"num_attention_heads": 4},
}
SHAPES: list[dict[str, Any]] = [
    {},
    {"use_dora": True, "layers_to_transform": [2, 0], "init_lora_weights": "olora"},
    {"target_modules": r"re:.*\.[12]\..*", "rank_pattern": {r".*\.1\..*": 7, r"2\.[^.]*\.[^.]*": 3}, "use_dora": True},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_layers_and_parameters_equal_those_of_the_engine(
    family: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        modules = find_linears(AutoModelForCausalLM.from_config(config))
    request = JobRequest.model_validate({"model": "m", "training_file": "f", "lora": {"rank": 5, **shape}})
    spec = resolve(request, num_rows=100, max_positions=None, seed=1)

    counted = target_modules.adapted(
        describe_base(tmp_path), spec.lora, base_name=family, matcher=target_modules.Matcher()
    )

    lora = job_config(spec, num_steps=1, evaluate_every_steps=None).lora
    targets = choose_targets(modules, lora)
    assert {each.linear.path: each.rank for each in counted} == {each.name: lora.rank_of(each.name) for each in targets}
    row = FlatAdapter(targets, lora, dtype=torch.float32, device="meta")
    assert spec.lora.begins_with_the_base == lora.subtracts_start
    num_parameters = memory.adapter_parameters(counted, use_dora=spec.lora.use_dora)
    assert num_parameters == row.num_parameters
    facts = JobMemory(
        num_parameters=num_parameters,
        use_dora=spec.lora.use_dora,
        init_lora_weights=spec.lora.init_lora_weights,
        longest_example=1,
    )
    parts = facts.parts(BaseModelMemory(describe_base(tmp_path), "float32"))
    counted_bytes = sum(parts.values()) - parts["lora_products"]
    outputs = sum(
        out_features * count for (out_features, _), count in describe_base(tmp_path)["linear_shapes"].values()
    )
    products = (
        memory.JOB_TOKENS * outputs * 4 if spec.lora.use_dora else 0
    )  # belongs to a slice, not to the adapter state
    assert row.num_bytes <= counted_bytes - products <= 1.15 * row.num_bytes


@pytest.mark.parametrize("shape", [{}, {"rank": 1}, {"rank": 32, "use_dora": True, "rank_pattern": {"q_proj": 9}}])
def test_the_adafactor_estimate_is_a_close_upper_bound(shape: dict[str, Any], tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"])
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        modules = find_linears(AutoModelForCausalLM.from_config(config))
    request = JobRequest.model_validate({"model": "m", "training_file": "f", "lora": shape})
    spec = resolve(request, num_rows=100, max_positions=None, seed=1)
    lora = job_config(spec, num_steps=1, evaluate_every_steps=None).lora
    targets = choose_targets(modules, lora)
    row = FlatAdapter(targets, lora, dtype=torch.float32, device="meta", optimizer="adafactor")

    resolved = spec.model_dump() | {"optimizer": {"type": "adafactor"}}
    counted = JobMemory.of_spec(resolved, num_parameters=row.num_parameters).row_bytes("float32")
    of_adamw = JobMemory(num_parameters=row.num_parameters).row_bytes("float32")

    assert row.num_bytes <= counted <= of_adamw
    assert counted <= 1.35 * row.num_bytes
    if lora.rank > 1:
        assert counted < 0.75 * of_adamw

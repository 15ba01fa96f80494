"""Submission counts the same layers and parameters as the engine adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from catalog.resources import memory
from catalog.resources.memory import BaseModelMemory, JobMemory
from catalog.spec import target_modules
from catalog.spec.job import JobRequest, resolve
from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import describe_base
from lora_core.base_model.patching import choose_targets, find_linears
from worker.children.trainer.job_config import job_config

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

"""Layer selection: patterns that match nothing or conflict are rejected at submission."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.errors import InvalidRequest
from catalog.spec.lora import LoraRequest, LoraSpec, resolve_lora
from catalog.spec.target_modules import Matcher, adapted

DESCRIPTION = {
    "linear_paths": [
        {"path": "model.layers.*.self_attn.q_proj", "shape": [64, 64], "layers": [0, 1]},
        {"path": "model.layers.*.mlp.up_proj", "shape": [128, 64], "layers": [0, 1]},
        {"path": "model.project_in", "shape": [64, 32], "layers": None},
    ]
}


def spec(**fields: Any) -> LoraSpec:
    return resolve_lora(LoraRequest.model_validate({"rank": 4, **fields}))


def ranks(**fields: Any) -> dict[str, int]:
    found = adapted(DESCRIPTION, spec(**fields), base_name="smol", matcher=Matcher())
    return {each.linear.path.removeprefix("model."): each.rank for each in found}


def test_names_layers_and_patterns_select_as_in_peft() -> None:
    assert ranks() == {
        "layers.0.self_attn.q_proj": 4,
        "layers.1.self_attn.q_proj": 4,
        "layers.0.mlp.up_proj": 4,
        "layers.1.mlp.up_proj": 4,
        "project_in": 4,
    }
    assert ranks(target_modules=["1.mlp.up_proj", "project_in"]) == {"layers.1.mlp.up_proj": 4, "project_in": 4}
    assert ranks(target_modules=r"re:.*\.0\..*proj") == {"layers.0.self_attn.q_proj": 4, "layers.0.mlp.up_proj": 4}
    assert ranks(layers_to_transform=[1, 1], rank_pattern={"q_proj": 2, r"layers\.1\.mlp.*": 8}) == {
        "layers.1.self_attn.q_proj": 2,
        "layers.1.mlp.up_proj": 8,
    }


@pytest.mark.parametrize(
    ("fields", "code", "param", "remedy"),
    [
        ({"target_modules": ["up_prj"]}, "unknown_target_modules", "target_modules", "Did you mean up_proj?"),
        ({"target_modules": "re:q_proj"}, "unknown_target_modules", "target_modules", "such as model.project_in"),
        ({"layers_to_transform": [0, 2]}, "conflicting_value", "layers_to_transform", "block numbers from 0 to 1"),
        (
            {"layers_to_transform": [0], "target_modules": ["project_in"]},
            "conflicting_value",
            "layers_to_transform",
            "Omit lora.layers_to_transform",
        ),
        ({"rank_pattern": {"q_prj": 8}}, "conflicting_value", "rank_pattern", "Did you mean q_proj?"),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {"up_proj": 8}},
            "conflicting_value",
            "alpha_pattern",
            "name (q_proj)",
        ),
        (
            {"rank_pattern": {"q_proj": 8, "0.self_attn.q_proj": 2}},
            "conflicting_value",
            "rank_pattern",
            "only one matches",
        ),
        ({"alpha_pattern": {"q_proj": 8, ".*": 2.5}}, "conflicting_value", "alpha_pattern", "only one matches"),
        (
            {"init_lora_weights": "pissa", "rank_pattern": {"project_in": 33}},
            "conflicting_value",
            "rank_pattern",
            "to 32 or less",
        ),
        ({"init_lora_weights": "pissa", "rank": 33}, "conflicting_value", "rank", "omit lora.init_lora_weights"),
        (
            {"init_lora_weights": "pissa", "rank": 65},
            "conflicting_value",
            "rank",
            "Lower lora.rank to 32 or less, set lower ranks for project_in, q_proj and up_proj in lora.rank_pattern,",
        ),
        (
            {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 65}},
            "conflicting_value",
            "rank_pattern",
            "Set the ranks of q_proj to 64 or less in lora.rank_pattern, or omit",
        ),
        ({"rank_pattern": {r"((\w|\w\w|\.)+)+[XY]": 8}}, "invalid_value", "rank_pattern", "nested"),
    ],
)
def test_impossible_selection_is_rejected_with_a_remedy(
    fields: dict[str, Any], code: str, param: str, remedy: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ranks(**fields)

    assert (refusal.value.code, refusal.value.param) == (code, f"lora.{param}")
    assert remedy in refusal.value.remedy


def test_all_layers_and_keys_at_fault_are_named() -> None:
    with pytest.raises(InvalidRequest) as too_high:
        ranks(init_lora_weights="pissa", rank=65)
    with pytest.raises(InvalidRequest) as unknown:
        ranks(rank_pattern={"q_proj": 8, "one": 8, "two": 8})

    assert too_high.value.message.endswith(" This also applies to 4 other layers (project_in, q_proj, up_proj).")
    assert unknown.value.message == "The keys 'one' and 'two' in lora.rank_pattern do not match any targeted layer."


def test_agreeing_keys_on_one_layer_are_accepted() -> None:
    assert ranks(target_modules=["q_proj"], rank_pattern={"q_proj": 8, "0.self_attn.q_proj": 8}) == {
        "layers.0.self_attn.q_proj": 8,
        "layers.1.self_attn.q_proj": 8,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "q_proj"},
        {"target_modules": "re:"},
        {"target_modules": "re:("},
        {"target_modules": "re:(a{9000}){9000}"},
        {"rank_pattern": {"(": 1}},
        {"rank_pattern": {"(a{9000}){9000}": 1}},
        {"rank_pattern": {"": 1}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": 257}},
        {"rank_pattern": {"q_proj": 2.5}},
        {"rank_pattern": {f"q{number}": 1 for number in range(33)}},
        {"alpha_pattern": {"q_proj": 0}},
        {"layers_to_transform": []},
        {"init_lora_weights": "pissa_niter_0"},
        {"layers_to_transform": [-1]},
        {"layers_to_transform": [0], "target_modules": "re:.*q_proj"},
    ],
)
def test_malformed_selection_is_rejected_by_the_schema(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        LoraRequest.model_validate(fields)

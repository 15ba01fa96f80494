"""Rejected parents: folders that can't be trusted or used, and jobs that differ from their parent."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.base_model.model import load_base
from lora_core.config import LoraConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadParent, ConfigError
from lora_core.peft_format.export import CONFIG, WEIGHTS
from lora_core.peft_format.load_parent import MAX_CONFIG_BYTES, lora_config_of
from lora_core.runtime.safetensors_io import MAX_HEADER_BYTES, MAX_TENSORS
from tests.lora_core.parents import child_of, make_parent
from tests.lora_core.scenarios import Submission, admit

Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def engine(load) -> Engine:
    return Engine(load("llama"), EngineConfig())


@pytest.fixture(scope="module")
def good_parent(base_dirs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parents") / "parent"
    make_parent(load_base(base_dirs["llama"], dtype="float32", device="cpu"), folder)
    return folder


@pytest.fixture
def child(good_parent, tmp_path: Path) -> Submission:
    """A child that would be admitted."""
    shutil.copytree(good_parent, tmp_path / "parent")
    return child_of(tmp_path / "parent")


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **metadata: str
) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata=metadata or None)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def plus(**more: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


NOT_FINITE = {f"{Q}.lora_B.weight": torch.full((64, 4), float("nan"))}
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "is a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "pickle"),
    "has no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "has no configuration": (lambda f: (f / CONFIG).unlink(), "missing"),
    "has a huge configuration": (lambda f: edit_config(f, x="y" * MAX_CONFIG_BYTES), f"exceeds {MAX_CONFIG_BYTES}"),
    "isn't JSON": (lambda f: (f / CONFIG).write_bytes(b"\x80\x04"), "not valid JSON"),
    "nests too deeply": (lambda f: (f / CONFIG).write_text("[" * 100_000), "not valid JSON"),
    "is not an object": (lambda f: (f / CONFIG).write_text("[]"), "plain LoRA"),
    "is of another method": (lambda f: edit_config(f, peft_type="LOHA"), "plain LoRA"),
    "names classes": (lambda f: edit_config(f, auto_mapping={"parent_library": "evil"}), "auto_mapping"),
    "has a huge header": (
        lambda f: (f / WEIGHTS).write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}"),
        f"header of {MAX_HEADER_BYTES + 1:,}",
    ),
    "has too many tensors": (
        lambda f: edit_weights(f, lambda _: {f"t{index}": torch.zeros(1) for index in range(MAX_TENSORS + 1)}),
        f"{MAX_TENSORS + 1:,} tensors",
    ),
    "is truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "safetensors"),
    "has foreign names": (lambda f: edit_weights(f, plus(lm_head=torch.zeros(3))), "'lm_head'"),
    "contains integers": (
        lambda f: edit_weights(f, plus(**{f"{Q}.x": torch.zeros(3, dtype=torch.int64)})),
        "dtype I64",
    ),
    "contains no tensors": (lambda f: edit_weights(f, lambda _: {}), "does not adapt any linear layer"),
    "lacks a matrix": (lambda f: edit_weights(f, without(f"{Q}.lora_B.weight")), "q_proj.lora_B.weight is missing"),
    "has another shape": (
        lambda f: edit_weights(f, plus(**{f"{Q}.lora_B.weight": torch.zeros(32, 4)})),
        r"\[32, 4\], but this base model or job needs \[64, 4\]",
    ),
    "has another rank": (lambda f: edit_weights(f, plus(**{f"{Q}.lora_A.weight": torch.zeros(5, 64)})), "the rank 4"),
    "isn't finite": (lambda f: edit_weights(f, plus(**NOT_FINITE)), "infinite or NaN"),
    "adapts an embedding": (
        lambda f: edit_weights(f, plus(base_model__model__embed_tokens__lora_embedding_A=torch.zeros(4, 320))),
        "embed_tokens.lora_embedding_A",
    ),
    "has biases": (lambda f: edit_weights(f, plus(**{f"{Q}.lora_B.bias": torch.zeros(64)})), "lora_B.bias"),
    "was trained on another precision": (
        lambda f: edit_weights(f, lambda t: t, base_quantization_config='{"load_in_4bit": true}'),
        "quantization nf4 in training, but this one has none",
    ),
    "has invalid metadata of its base": (
        lambda f: edit_weights(f, lambda t: t, base_quantization_config="["),
        "base_quantization_config",
    ),
    "was initialized by PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa"), "changed copy of the base"),
    "has an unsupported method": (lambda f: edit_config(f, use_qalora=True), "use_qalora=True"),
    "has trained biases": (lambda f: edit_config(f, bias="all"), "bias='all'"),
    "has an unknown field": (lambda f: edit_config(f, use_wonder=True), "use_wonder=True"),
    "has a string as a rank": (lambda f: edit_config(f, r="8"), "r='8'"),
    "has an alpha of infinity": (lambda f: edit_config(f, lora_alpha=1e400), "lora_alpha=inf"),
    "has an alpha longer than a float": (lambda f: edit_config(f, lora_alpha=10**400), "lora_alpha=1000"),
    "has a rank longer than a float": (lambda f: edit_config(f, r=10**400), "r=1000"),
    "has a boolean as a token": (lambda f: edit_config(f, trainable_token_indices=[True]), "trainable_token_indices"),
    "has an alpha below zero": (lambda f: edit_config(f, lora_alpha=-1), "lora.alpha is -1"),
    "has patterns of the wrong type": (lambda f: edit_config(f, alpha_pattern=[1]), "alpha_pattern"),
    "has a pattern that takes too long": (
        lambda f: edit_config(f, alpha_pattern={r"((\w|\w\w|\.)+)+[XY]": 3}),
        "takes too long",
    ),
    "has a pattern that doesn't compile": (lambda f: edit_config(f, rank_pattern={"(": 3}), "rank_pattern={'\\('"),
    "contradicts itself on dora": (lambda f: edit_config(f, use_dora=True), "use_dora in its adapter_config.json"),
    "has tokens of several tables": (
        lambda f: edit_config(f, trainable_token_indices={"a": [1], "b": [2]}),
        "one list",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_invalid_parent_folder_is_rejected(engine, child, name):
    damage, reason = FOLDERS[name]
    damage(child.parent)

    with pytest.raises(BadParent, match=reason) as refused:
        admit(engine, "job", child)

    assert refused.value.code == "bad_parent"
    assert refused.value.remedy
    assert engine.jobs() == ()


def test_unknown_fields_without_effect_are_accepted(engine, child):
    edit_config(
        child.parent, use_wonder=False, wonder_config=None, loftq_config={}, peft_version="99.0", corda_config=None
    )

    admit(engine, "job", child)

    assert engine.jobs() == ("job",)


JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 8}, "rank of .* is 8 in the job and 4 in its parent"),
    "alpha": ({"alpha": 16}, "scale of .* is 4.0 in the job and 2.0 in its parent"),
    "use_rslora": ({"use_rslora": True}, "scale of .* is 4.0 in the job and 2.0"),
    "use_dora": ({"use_dora": True}, "use_dora is True in the job and False"),
    "target_modules": ({"target_modules": ("q_proj",)}, "the parent adapts .*, but the job doesn't"),
}


@pytest.mark.parametrize("field", JOBS)
def test_job_that_differs_from_its_parent_is_rejected_by_field(engine, child, field):
    fields, reason = JOBS[field]
    other = replace(child.config, lora=replace(child.config.lora, **fields))

    with pytest.raises(ConfigError, match=f"lora.{field} .*{reason}") as refused:
        admit(engine, "job", replace(child, config=other))

    assert "lora_config_of" in refused.value.remedy
    assert engine.jobs() == ()


def test_layers_that_the_parent_lacks_are_rejected_by_name(engine, load, tmp_path, child):
    edit_weights(child.parent, lambda tensors: {name: tensors[name] for name in tensors if "q_proj" in name})

    with pytest.raises(ConfigError, match=r"the job adapts model.layers.0.mlp.down_proj, but its parent doesn't"):
        admit(engine, "job", child)


def test_initialization_other_than_the_parent_is_rejected(engine, child):
    other = replace(child.config, lora=replace(child.config.lora, init_lora_weights="pissa"))

    with pytest.raises(ConfigError, match=r"init_lora_weights is 'pissa', but the job starts with its parent's"):
        admit(engine, "job", replace(child, config=other))


@pytest.mark.parametrize(("method", "field"), [("in_full", "modules_to_save"), ("tokens", "trainable_token_indices")])
def test_omitting_a_fully_trained_module_of_the_parent_is_rejected(engine, load, tmp_path, method, field):
    make_parent(load("llama"), tmp_path / "parent", method)
    child = child_of(tmp_path / "parent")
    less = replace(child.config.lora, modules_to_save=(), trainable_token_indices=())

    with pytest.raises(ConfigError, match=f"lora.{field}"):
        admit(engine, "job", replace(child, config=replace(child.config, lora=less)))


def test_trained_tokens_in_another_order_are_rejected(engine, load, tmp_path):
    make_parent(load("llama"), tmp_path / "parent", "tokens")
    child = child_of(tmp_path / "parent")
    tokens = child.config.lora.trainable_token_indices[::-1]
    turned = replace(child.config, lora=replace(child.config.lora, trainable_token_indices=tokens))

    with pytest.raises(ConfigError, match=r"the parent trained \[300, 2, 17, .*, in this order"):
        admit(engine, "job", replace(child, config=turned))


def test_values_that_overflow_the_dtype_of_training_are_rejected(load, child):
    edit_weights(child.parent, plus(**{f"{Q}.lora_B.weight": torch.full((64, 4), 3.4e38)}))

    admit(Engine(load("llama"), EngineConfig()), "job", child)
    with pytest.raises(BadParent, match="infinite or NaN in the training dtype"):
        admit(Engine(load("llama", "bfloat16"), EngineConfig()), "job", child)


def test_parent_of_another_base_model_is_rejected(load, child):
    engine = Engine(load("gpt2"), EngineConfig())

    with pytest.raises(BadParent, match=r"adapts model\..*, which this base model doesn't have"):
        admit(engine, "job", replace(child, config=replace(child.config, lora=LoraConfig(rank=4, alpha=8))))


def test_missing_folder_is_rejected(tmp_path):
    with pytest.raises(BadParent, match="is missing"):
        lora_config_of(tmp_path / "nowhere")

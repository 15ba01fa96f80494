"""What isn't continued: folders that can't be trusted or used, and jobs that are other than their parent."""

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
from lora_core.peft_format.load_parent import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, lora_config_of
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
    """One that would be admitted."""
    shutil.copytree(good_parent, tmp_path / "parent")
    return child_of(tmp_path / "parent")


def said(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def held(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **metadata: str) -> None:
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
    "has a huge configuration": (lambda f: said(f, x="y" * MAX_CONFIG_BYTES), f"exceeds {MAX_CONFIG_BYTES}"),
    "isn't JSON": (lambda f: (f / CONFIG).write_bytes(b"\x80\x04"), "not valid JSON"),
    "nests without end": (lambda f: (f / CONFIG).write_text("[" * 100_000), "not valid JSON"),
    "is no object": (lambda f: (f / CONFIG).write_text("[]"), "plain LoRA"),
    "is of another method": (lambda f: said(f, peft_type="LOHA"), "plain LoRA"),
    "names classes": (lambda f: said(f, auto_mapping={"parent_library": "evil"}), "auto_mapping"),
    "has a huge header": (
        lambda f: (f / WEIGHTS).write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}"),
        f"header of {MAX_HEADER_BYTES + 1}",
    ),
    "has too many tensors": (
        lambda f: held(f, lambda _: {f"t{index}": torch.zeros(1) for index in range(MAX_TENSORS + 1)}),
        f"{MAX_TENSORS + 1} tensors",
    ),
    "is cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "safetensors"),
    "has foreign names": (lambda f: held(f, plus(lm_head=torch.zeros(3))), "'lm_head'"),
    "holds whole numbers": (lambda f: held(f, plus(**{f"{Q}.x": torch.zeros(3, dtype=torch.int64)})), "dtype I64"),
    "holds nothing": (lambda f: held(f, lambda _: {}), "no linear layer"),
    "lacks a matrix": (lambda f: held(f, without(f"{Q}.lora_B.weight")), "q_proj.lora_B.weight is missing"),
    "has another shape": (
        lambda f: held(f, plus(**{f"{Q}.lora_B.weight": torch.zeros(32, 4)})),
        r"\[32, 4\], but this base model or job needs \[64, 4\]",
    ),
    "has another rank": (lambda f: held(f, plus(**{f"{Q}.lora_A.weight": torch.zeros(5, 64)})), "the rank 4"),
    "isn't finite": (lambda f: held(f, plus(**NOT_FINITE)), "not finite"),
    "adapts an embedding": (
        lambda f: held(f, plus(base_model__model__embed_tokens__lora_embedding_A=torch.zeros(4, 320))),
        "embed_tokens.lora_embedding_A",
    ),
    "has biases": (lambda f: held(f, plus(**{f"{Q}.lora_B.bias": torch.zeros(64)})), "lora_B.bias"),
    "was trained on another precision": (
        lambda f: held(f, lambda t: t, base_quantization_config='{"load_in_4bit": true}'),
        "quantization nf4 in training, but this one has none",
    ),
    "lies about its base": (lambda f: held(f, lambda t: t, base_quantization_config="["), "base_quantization_config"),
    "began as PiSSA": (lambda f: said(f, init_lora_weights="pissa"), "changed copy of the base"),
    "has a method of its own": (lambda f: said(f, use_qalora=True), "use_qalora=True"),
    "has trained biases": (lambda f: said(f, bias="all"), "bias='all'"),
    "has a field of the future": (lambda f: said(f, use_wonder=True), "use_wonder=True"),
    "has no number for a rank": (lambda f: said(f, r="8"), "r='8'"),
    "has an alpha of infinity": (lambda f: said(f, lora_alpha=1e400), "lora_alpha=inf"),
    "has an alpha longer than a float": (lambda f: said(f, lora_alpha=10**400), "lora_alpha=1000"),
    "has a rank longer than a float": (lambda f: said(f, r=10**400), "r=1000"),
    "has a truth for a token": (lambda f: said(f, trainable_token_indices=[True]), "trainable_token_indices"),
    "has an alpha below zero": (lambda f: said(f, lora_alpha=-1), "lora.alpha is -1"),
    "has a pattern that isn't one": (lambda f: said(f, alpha_pattern=[1]), "alpha_pattern"),
    "has a pattern without end": (lambda f: said(f, alpha_pattern={r"((\w|\w\w|\.)+)+[XY]": 3}), "takes too long"),
    "has a pattern that doesn't compile": (lambda f: said(f, rank_pattern={"(": 3}), "rank_pattern={'\\('"),
    "contradicts itself on dora": (lambda f: said(f, use_dora=True), "about use_dora"),
    "has tokens of three tables": (lambda f: said(f, trainable_token_indices={"a": [1], "b": [2]}), "one list"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_refused_that(engine, child, name):
    damage, reason = FOLDERS[name]
    damage(child.parent)

    with pytest.raises(BadParent, match=reason) as refused:
        admit(engine, "job", child)

    assert refused.value.code == "bad_parent"
    assert refused.value.remedy
    assert engine.jobs() == ()


def test_new_fields_of_peft_that_ask_for_nothing_are_no_obstacle(engine, child):
    said(child.parent, use_wonder=False, wonder_config=None, loftq_config={}, peft_version="99.0", corda_config=None)

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
def test_a_job_that_asks_for_another_adapter_than_its_parent_is_refused_by_the_field(engine, child, field):
    fields, reason = JOBS[field]
    other = replace(child.config, lora=replace(child.config.lora, **fields))

    with pytest.raises(ConfigError, match=f"lora.{field} .*{reason}") as refused:
        admit(engine, "job", replace(child, config=other))

    assert "lora_config_of" in refused.value.remedy
    assert engine.jobs() == ()


def test_layers_that_the_parent_has_not_are_refused_by_name(engine, load, tmp_path, child):
    held(child.parent, lambda tensors: {name: tensors[name] for name in tensors if "q_proj" in name})

    with pytest.raises(ConfigError, match=r"the job adapts model.layers.0.mlp.down_proj, but its parent doesn't"):
        admit(engine, "job", child)


def test_another_start_than_the_parents_is_refused(engine, child):
    other = replace(child.config, lora=replace(child.config.lora, init_lora_weights="pissa"))

    with pytest.raises(ConfigError, match=r"init_lora_weights is 'pissa', but the job starts with its parent's"):
        admit(engine, "job", replace(child, config=other))


@pytest.mark.parametrize(("method", "field"), [("in_full", "modules_to_save"), ("tokens", "trainable_token_indices")])
def test_what_the_parent_trained_in_full_is_not_left_behind(engine, load, tmp_path, method, field):
    make_parent(load("llama"), tmp_path / "parent", method)
    child = child_of(tmp_path / "parent")
    less = replace(child.config.lora, modules_to_save=(), trainable_token_indices=())

    with pytest.raises(ConfigError, match=f"lora.{field}"):
        admit(engine, "job", replace(child, config=replace(child.config, lora=less)))


def test_trained_tokens_in_another_order_are_other_tokens(engine, load, tmp_path):
    make_parent(load("llama"), tmp_path / "parent", "tokens")
    child = child_of(tmp_path / "parent")
    tokens = child.config.lora.trainable_token_indices[::-1]
    turned = replace(child.config, lora=replace(child.config.lora, trainable_token_indices=tokens))

    with pytest.raises(ConfigError, match=r"the parent trained \[300, 2, 17, .*, in this order"):
        admit(engine, "job", replace(child, config=turned))


def test_numbers_that_overflow_the_dtype_of_training_are_refused(load, child):
    held(child.parent, plus(**{f"{Q}.lora_B.weight": torch.full((64, 4), 3.4e38)}))

    admit(Engine(load("llama"), EngineConfig()), "job", child)
    with pytest.raises(BadParent, match="not finite in the dtype of training"):
        admit(Engine(load("llama", "bfloat16"), EngineConfig()), "job", child)


def test_a_parent_of_another_base_model_is_refused(load, child):
    engine = Engine(load("gpt2"), EngineConfig())

    with pytest.raises(BadParent, match=r"adapts model\..*, which this base model doesn't have"):
        admit(engine, "job", replace(child, config=replace(child.config, lora=LoraConfig(rank=4, alpha=8))))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadParent, match="is missing"):
        lora_config_of(tmp_path / "nowhere")

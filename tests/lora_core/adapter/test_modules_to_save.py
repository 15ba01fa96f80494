"""Output heads and token embeddings that a job trains in addition to A and B, as in PEFT and in PEFT's files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.config import LoraConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadAdapter, ConfigError, NoTargets
from lora_core.model_files.merge import merge_adapter
from lora_core.peft_format.export import PROBE_SEED, pseudo_random_ids, with_tokens
from lora_core.peft_format.verify import verify_export
from tests.lora_core.exports import trained
from tests.lora_core.peft_format.test_peft_parity import LONG, assert_equal_to_peft
from tests.lora_core.scenarios import VOCAB, Submission, admit, config, dataset

TOKENS = (319, 5, *range(40, 90))
HEAD = {"modules_to_save": ("lm_head",)}
EMBEDDINGS = {"trainable_token_indices": TOKENS}
CASES = [("llama", HEAD | EMBEDDINGS), ("gpt2", HEAD), ("gpt2", EMBEDDINGS)]


def job_with(fields: dict, *, dropout: float = 0.0) -> Submission:
    job = config(num_steps=6, learning_rate=1e-2, dropout=dropout, seed=3)
    return Submission(config=replace(job, lora=replace(job.lora, **fields)), train=dataset(3, [20, 33, 15, 28]))


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_twenty_steps_equal_peft(load, tmp_path, family, fields):
    calm = replace(LONG, num_steps=20, optimizer=replace(LONG.optimizer, learning_rate=1e-3))

    assert_equal_to_peft(load, family, replace(calm, lora=replace(calm.lora, **fields)), tmp_path)


@pytest.mark.parametrize(
    ("family", "fields", "dtype"),
    [
        ("llama", HEAD | EMBEDDINGS, "bfloat16"),
        ("llama", HEAD | EMBEDDINGS, "float32"),
        ("gpt2", HEAD, "bfloat16"),
        ("gpt2", EMBEDDINGS, "bfloat16"),
    ],
)
def test_fully_trained_modules_are_verified_and_changed_tensors_detected(load, tmp_path, family, fields, dtype):
    base = load(family, dtype)
    folder = tmp_path / "adapter"
    report = trained(base, job_with(fields)).export("job", folder, base_name="tiny")

    before = dict(base.model.named_parameters(remove_duplicate=False))
    verdict = verify_export(base, folder)

    assert verdict.passed, verdict
    for name, parameter in base.model.named_parameters(remove_duplicate=False):
        assert parameter is before[name], "verification must leave no trace in the base"
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    in_full = [name for name in tensors if "lora_" not in name]
    assert len(in_full) == len(fields)
    assert report.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    for name in in_full:
        save_file(tensors | {name: -tensors[name]}, path)
        assert not verify_export(base, folder).passed, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verification_detects_a_change_of_each_trained_token(load, tmp_path, dtype):
    base, folder = load("llama", dtype), tmp_path / "adapter"
    tokens = [token for token in range(VOCAB) if token not in pseudo_random_ids(base, "probe", PROBE_SEED)][:3]
    trained(base, job_with({"trainable_token_indices": tuple(tokens)})).export("job", folder, base_name="tiny")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if "lora_" not in name]

    assert verify_export(base, folder).passed
    for index in range(len(tokens)):
        changed = tensors[name].clone()
        changed[index] *= -1
        save_file(tensors | {name: changed}, path)
        assert not verify_export(base, folder).passed, index


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", HEAD), ("llama", {"trainable_token_indices": tuple(range(40, 240))}), ("gpt2", EMBEDDINGS)],
)
def test_verification_detects_and_names_one_wrong_row_among_many(load, tmp_path, family, fields, dtype):
    base, folder = load(family, dtype), tmp_path / "adapter"
    trained(base, job_with(fields)).export("job", folder, base_name="tiny")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if "lora_" not in name]

    sound = verify_export(base, folder)

    assert sound.passed
    for index in range(0, len(tensors[name]), max(1, len(tensors[name]) // 4)):
        changed = tensors[name].clone()
        changed[index] *= 0.9
        save_file(tensors | {name: changed}, path)
        damaged = verify_export(base, folder)
        assert not damaged.passed, index
        assert damaged.worst_linear in ("the output head", "a trained embedding", "a trained row of the head")


def test_probe_holds_trained_tokens_in_up_to_half_of_its_positions():
    ids = np.full((2, 48), -1)

    few, many = with_tokens(ids, [7, 8, 9]), with_tokens(ids, list(range(1000)))

    assert few[:, -2:].tolist() == [[9, 7], [-1, 8]]
    assert (few >= 0).sum() == 3
    assert len(np.unique(many[many >= 0])) == 48
    assert {0, 999} <= set(many.flat)
    assert (ids == -1).all()


@pytest.mark.parametrize("fields", [HEAD, EMBEDDINGS])
def test_base_stays_unchanged_and_usable_after_full_training(load, fields):
    base = load("llama")
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    ids = torch.arange(40)[None]

    engine = trained(base, job_with(fields))

    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    adapter = engine._jobs["job"].adapter
    for tensor in adapter.trained.tensors:
        moved = (adapter.tensors[tensor.name].value != tensor.start(0)).any()
        assert moved, tensor.name
    engine.evict("job")
    with base.untouched() as model, torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()


def test_only_selected_tokens_that_occur_change_their_embedding(load):
    engine = trained(load("llama"), job_with({"trainable_token_indices": (*TOKENS, 7)}))
    job = engine._jobs["job"]
    (tensor,) = job.adapter.trained.tensors
    decay = 0.01 * 1e-2 * 6  # maximum relative change by weight decay

    change = (job.adapter.tensors[tensor.name].value - tensor.start(0)).abs().amax(1)

    lasts = job.train.row_offsets[1:] - 1  # nothing follows them, so they have no gradient
    occurring = set(np.delete(job.train.input_ids, lasts).tolist())
    for token, largest in zip(job.adapter.trained.token_ids, change.tolist(), strict=True):
        assert (largest > 1e-3) == (token in occurring), token
        assert token in occurring or largest < decay


@pytest.mark.parametrize(("family", "fields"), [("llama", HEAD | EMBEDDINGS), ("gpt2", EMBEDDINGS)])
def test_merged_model_equals_adapted_model_with_fully_trained_modules(load, base_dirs, tmp_path, family, fields):
    base = load(family)
    trained(base, job_with(fields)).export("job", tmp_path / "adapter", base_name="tiny")

    report = merge_adapter(tmp_path / "adapter", base_dirs[family], tmp_path / "merged")

    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    probe = load_file(tmp_path / "adapter" / "probe.safetensors")
    with torch.no_grad():
        logits = merged(input_ids=probe["input_ids"]).logits[:, -2:]
    torch.testing.assert_close(logits, probe["logits"], atol=1e-3, rtol=1e-3)
    assert report.max_abs_effect > 10 * report.tolerance


def test_head_tied_to_the_embeddings_is_not_merged(load, base_dirs, tmp_path):
    trained(load("gpt2"), job_with(HEAD)).export("job", tmp_path / "adapter", base_name="tiny")

    with pytest.raises(BadAdapter, match="shares with its embeddings"):
        merge_adapter(tmp_path / "adapter", base_dirs["gpt2"], tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_exported_configuration_names_the_fully_trained_modules(load, tmp_path):
    for name, fields in {"both": HEAD | EMBEDDINGS, "neither": {}}.items():
        trained(load("llama"), job_with(fields)).export("job", tmp_path / name, base_name="tiny")
    both, neither = (_configuration(tmp_path / name) for name in ("both", "neither"))

    assert (both["modules_to_save"], both["trainable_token_indices"]) == (["lm_head"], list(TOKENS))
    assert (neither["modules_to_save"], neither["trainable_token_indices"]) == (None, None)


def _configuration(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("llama", {"modules_to_save": ("score",)}, "'score', which this base model doesn't have"),
        ("llama", {"modules_to_save": ("embed_tokens",)}, "'embed_tokens', which can't be trained in full"),
        ("llama", {"modules_to_save": ("q_proj",)}, "'q_proj', which can't be trained in full"),
        ("llama", {"trainable_token_indices": (320,)}, "token ID 320, but the maximum for this base model is 319"),
        ("gpt2", HEAD | EMBEDDINGS, "two embeddings"),
    ],
)
def test_modules_that_cannot_be_fully_trained_are_rejected_by_name(load, family, fields, sentence):
    engine = Engine(load(family), EngineConfig())

    with pytest.raises(NoTargets, match=sentence) as refusal:
        admit(engine, "job", job_with(fields))

    assert refusal.value.remedy
    assert engine.jobs() == ()


@pytest.mark.parametrize(
    "fields",
    [{"trainable_token_indices": (-1,)}, {"trainable_token_indices": (3, 3)}, {"modules_to_save": ("a", "a")}],
)
def test_invalid_token_ids_and_duplicate_names_are_rejected(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LoraConfig(rank=1, alpha=1, **fields)

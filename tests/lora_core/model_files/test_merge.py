"""Invariant: merged equals adapted. W + B A gives the logits of W with the adapter, up to rounding of the dtype."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadAdapter, UnsupportedModel
from lora_core.model_files import merge
from lora_core.model_files.merge import main, merge_adapter
from lora_core.model_files.merge_cost import Operation, compare_cost, operations
from lora_core.peft_format.verify import verify_export
from tests import tiny_base
from tests.lora_core.scenarios import Submission, admit, config, dataset

JOB = Submission(config=config(num_steps=6, learning_rate=2e-2), train=dataset(1, [20, 33, 15]))


@pytest.fixture(scope="session")
def tied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("tied")
    tiny_base._build(folder)
    return folder


@pytest.fixture
def adapter_of(tmp_path: Path):
    """adapter_of(base_dir, dtype): the folder of a trained adapter."""

    def train(
        base_dir: Path,
        dtype: Literal["float32", "bfloat16"] = "float32",
        *,
        use_dora: bool = False,
        quantization: Literal["none", "nf4", "int8"] = "none",
    ) -> Path:
        engine = Engine(load_base(base_dir, dtype=dtype, device="cpu", quantization=quantization), EngineConfig())
        lora = replace(JOB.config.lora, use_dora=use_dora)
        admit(engine, "job", replace(JOB, config=replace(JOB.config, lora=lora)))
        while not engine.idle:
            engine.tick()
        engine.export("job", tmp_path / "adapter", base_name="tiny")
        return tmp_path / "adapter"

    return train


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_adapter_is_merged_as_peft_reads_it(base_dirs, adapter_of, tmp_path, family):
    report = merge_adapter(adapter_of(base_dirs[family], use_dora=True), base_dirs[family], tmp_path / "merged")

    assert report.max_abs_diff <= report.tolerance < report.max_abs_effect / 2, report


@pytest.mark.slow_repetitions
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "tied"])
def test_merged_equals_adapted(base_dirs, tied_dir, adapter_of, tmp_path, family, dtype):
    base_dir = {**base_dirs, "tied": tied_dir}[family]
    adapter_dir = adapter_of(base_dir, dtype)

    report = merge_adapter(adapter_dir, base_dir, tmp_path / "merged", dtype=dtype)

    assert report.max_abs_diff <= report.tolerance < report.max_abs_effect / 2, report
    assert report.update_error == 0 if dtype == "float32" else 0 < report.update_error < 0.2, report
    ids = torch.arange(40)[None]
    merged = load_base(tmp_path / "merged", dtype=dtype, device="cpu").model
    plain = load_base(base_dir, dtype=dtype, device="cpu").model
    adapted = peft.PeftModel.from_pretrained(plain, str(adapter_dir)).eval()
    with torch.no_grad():
        difference = merged(input_ids=ids).logits - adapted(input_ids=ids).logits
    assert float(difference.abs().max()) <= report.tolerance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wrong_update_is_found_although_rounding_hides_it(base_dirs, adapter_of, tmp_path, monkeypatch, family, factor):
    """Only one linear is wrong, and its effect on the logits is smaller than that of rounding."""
    adapter_dir = adapter_of(base_dirs[family], "bfloat16")
    right, wrong = peft.tuners.lora.Linear.get_delta_weight, list[object]()

    def get_delta_weight(layer, adapter):
        wrong[:] = wrong or [layer]
        return right(layer, adapter) * (factor if layer is wrong[0] else 1)

    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", get_delta_weight)

    with pytest.raises(BadAdapter, match="a merged layer adds something else than the adapter"):
        merge_adapter(adapter_dir, base_dirs[family], tmp_path / "merged", dtype="bfloat16")

    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge_adds_in_fp32_and_rounds_once(base_dirs, adapter_of, tmp_path, family):
    adapter_dir = adapter_of(base_dirs[family], "bfloat16")

    merge_adapter(adapter_dir, base_dirs[family], tmp_path / "merged", dtype="bfloat16")

    name = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.mlp.c_fc"}[family]
    adapter = load_file(adapter_dir / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    update = 2 * (b @ a)
    state = load_base(base_dirs[family], dtype="bfloat16", device="cpu").model.state_dict()
    weight = state[f"{name}.weight"].float()
    expected = (weight + (update.T if family == "gpt2" else update)).bfloat16()
    merged = load_base(tmp_path / "merged", dtype="bfloat16", device="cpu").model.state_dict()[f"{name}.weight"]
    assert torch.equal(merged, expected)


def test_merged_model_has_the_named_templates_of_the_base(tied_dir, adapter_of, tmp_path):
    base_dir = shutil.copytree(tied_dir, tmp_path / "base")
    (base_dir / "additional_chat_templates").mkdir()
    (base_dir / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")

    merge_adapter(adapter_of(base_dir), base_dir, tmp_path / "merged")

    assert (tmp_path / "merged" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_merged_model_is_a_complete_folder_and_the_base_is_unchanged(tied_dir, adapter_of, tmp_path):
    before = {path.name: path.read_bytes() for path in tied_dir.iterdir()}
    report = merge_adapter(adapter_of(tied_dir), tied_dir, tmp_path / "merged")

    assert {path.name: path.read_bytes() for path in tied_dir.iterdir()} == before
    written = {path.name for path in (tmp_path / "merged").iterdir()}
    assert written == {*before, "merge.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == before[name]
    recorded = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert recorded["max_abs_diff"] == report.max_abs_diff
    assert recorded["num_merged"] == 14
    merged = load_base(tmp_path / "merged", dtype="float32", device="cpu").model
    output = merged.get_output_embeddings()
    assert output is not None
    assert merged.get_input_embeddings().weight is output.weight


def products(done: list[Operation]) -> Counter[Operation]:
    """Count the matmuls of each kind and shape."""
    kinds = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten._scaled_dot_product")
    return Counter(operation for operation in done if operation[0].startswith(kinds))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "use_dora"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_pass_of_a_merged_model_has_the_operations_of_its_base(tied_dir, adapter_of, tmp_path, dtype, use_dora):
    adapter_dir = adapter_of(tied_dir, dtype, use_dora=use_dora)
    merge_adapter(adapter_dir, tied_dir, tmp_path / "merged", dtype=dtype)

    cost = compare_cost(tied_dir, tmp_path / "merged", dtype=dtype, num_tokens=16, num_passes=1)

    assert cost.same_layers
    assert cost.same_operations
    assert cost.merged_parameters == cost.base_parameters
    ids = torch.arange(16)[None]
    plain, merged = (load_base(folder, dtype=dtype, device="cpu").model for folder in (tied_dir, tmp_path / "merged"))
    of_base = products(operations(plain, ids))
    assert products(operations(merged, ids)) == of_base
    adapted = peft.PeftModel.from_pretrained(plain, str(adapter_dir)).eval()
    assert products(operations(adapted, ids)).total() >= of_base.total() + 2 * 14  # A and B of each linear
    assert of_base.total() >= 14 + 1  # the head


def test_wider_model_with_the_same_layers_is_detected(tied_dir, tmp_path):
    settings = json.loads((tied_dir / "config.json").read_text()) | {"intermediate_size": 192}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(tmp_path / "wider")

    cost = compare_cost(tied_dir, tmp_path / "wider", dtype="float32", num_tokens=16, num_passes=1)

    assert (cost.same_layers, cost.same_operations) == (True, False)
    assert cost.merged_parameters > cost.base_parameters


def test_an_adapter_of_another_base_is_not_merged(base_dirs, tied_dir, adapter_of, tmp_path):
    adapter_dir = adapter_of(base_dirs["llama"])

    with pytest.raises(BadAdapter, match="does not reproduce the logits of training"):
        merge_adapter(adapter_dir, tied_dir, tmp_path / "same_shape")
    (adapter_dir / "probe.safetensors").unlink()
    with pytest.raises(BadAdapter):
        merge_adapter(adapter_dir, base_dirs["gpt2"], tmp_path / "another_family")
    assert not [path for path in tmp_path.iterdir() if path.name != "adapter"]


def test_file_that_does_not_match_the_manifest_is_rejected(tied_dir, adapter_of, tmp_path):
    adapter_dir = adapter_of(tied_dir)
    path = adapter_dir / "adapter_model.safetensors"
    entries = [{"path": path.name, "digest": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": 1}]
    (adapter_dir / "manifest.json").write_text(json.dumps({"files": entries}))
    merge.refuse_foreign_adapter(adapter_dir)

    path.write_bytes(path.read_bytes()[:-1] + b"!")

    with pytest.raises(BadAdapter, match=r"adapter_model.safetensors does not match its digest in manifest.json"):
        merge_adapter(adapter_dir, tied_dir, tmp_path / "merged")
    (adapter_dir / "manifest.json").write_text("{")
    with pytest.raises(BadAdapter, match=r"manifest.json can't be read"):
        merge_adapter(adapter_dir, tied_dir, tmp_path / "merged")


def test_missing_weights_that_peft_would_ignore_are_rejected(tied_dir, adapter_of, tmp_path):
    adapter_dir = adapter_of(tied_dir)
    (adapter_dir / "probe.safetensors").unlink()
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    first = sorted(tensors)[0]

    save_file(
        {name: tensor for name, tensor in tensors.items() if name != first}, adapter_dir / "adapter_model.safetensors"
    )

    with pytest.raises(BadAdapter, match="missing"):
        merge_adapter(adapter_dir, tied_dir, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore")
def test_adapter_on_a_tied_head_is_rejected(tied_dir, tmp_path):
    model = load_base(tied_dir, dtype="float32", device="cpu").model
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)

    with pytest.raises(BadAdapter, match="shares") as caught:
        merge_adapter(tmp_path / "adapter", tied_dir, tmp_path / "merged")

    assert "on the base model with PEFT" in caught.value.remedy


def test_weight_that_is_not_finite_is_rejected(tied_dir, adapter_of, tmp_path):
    adapter_dir = adapter_of(tied_dir)
    (adapter_dir / "probe.safetensors").unlink()
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, adapter_dir / "adapter_model.safetensors")

    with pytest.raises(BadAdapter, match="NaN"):
        merge_adapter(adapter_dir, tied_dir, tmp_path / "merged")


def test_quantized_file_is_merged_only_with_dequantize(tied_dir, adapter_of, tmp_path):
    path = tmp_path / "quantized.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    block = gguf.quants.quantize(np.ones((1, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", block, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(UnsupportedModel, match=r"Q8_0.*loses some or all") as refusal:
        merge_adapter(adapter_of(tied_dir), path, tmp_path / "merged")
    assert "--dequantize" in refusal.value.remedy


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapter_of_a_quantized_base_is_merged_only_with_dequantize(tied_dir, adapter_of, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    adapter = adapter_of(tied_dir, quantization=kind)

    with pytest.raises(UnsupportedModel, match=f"with {kind} quantization") as refusal:
        merge_adapter(adapter, tied_dir, tmp_path / "merged")
    assert "--dequantize" in refusal.value.remedy
    assert not (tmp_path / "merged").exists()

    report = merge_adapter(adapter, tied_dir, tmp_path / "merged", dequantize=True)
    assert report.trained_on == kind
    assert report.max_abs_diff <= report.tolerance
    assert report.max_abs_diff_to_trained is not None
    assert report.max_abs_diff_to_trained > report.tolerance
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["trained_on"] == kind


def test_int8_verification_tolerates_input_rounding_but_no_changed_weight(tied_dir, adapter_of):
    """The engine and PEFT can round the input of a linear to two neighboring int8 steps."""
    pytest.importorskip("bitsandbytes")
    adapter = adapter_of(tied_dir, quantization="int8")
    base = load_base(tied_dir, dtype="float32", device="cpu", quantization="int8")

    report = verify_export(base, adapter)

    assert report.passed
    assert report.tolerance < report.max_abs_effect / 2, "the adapter can't be distinguished from none"
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights | {name: 1.001 * weights[name] for name in [min(weights)]}, adapter / "adapter_model.safetensors")
    assert not verify_export(base, adapter).passed


def test_adapter_of_another_base_is_rejected_even_with_dequantize(tied_dir, base_dirs, adapter_of, tmp_path):
    pytest.importorskip("bitsandbytes")
    adapter = adapter_of(base_dirs["llama"], quantization="nf4")

    with pytest.raises(BadAdapter):
        merge_adapter(adapter, tied_dir, tmp_path / "merged", dequantize=True)


def test_quantized_folder_is_rejected(tied_dir, adapter_of, tmp_path):
    shutil.copytree(tied_dir, tmp_path / "base")
    content = json.loads((tmp_path / "base/config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base/config.json").write_text(json.dumps(content))

    with pytest.raises(UnsupportedModel, match="quantized"):
        merge_adapter(adapter_of(tied_dir), tmp_path / "base", tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_merged_equals_adapted_on_a_quantized_real_model(real_gguf, real_base_dir, adapter_of, tmp_path):
    report = merge_adapter(adapter_of(real_base_dir, "bfloat16"), real_gguf, tmp_path / "merged", dequantize=True)

    assert report.dequantized
    assert report.max_abs_diff <= report.tolerance
    cost = compare_cost(real_base_dir, tmp_path / "merged", dtype="bfloat16")
    assert (cost.same_layers, cost.same_operations) == (True, True)


def test_command_writes_the_folder_and_reports_difference_and_cost(tied_dir, adapter_of, tmp_path, capsys):
    arguments = [str(adapter_of(tied_dir)), str(tied_dir), str(tmp_path / "merged"), "--measure"]

    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["merged"]["max_abs_diff"] <= answer["merged"]["tolerance"]
    assert answer["cost"]["same_layers"] is True
    assert answer["cost"]["same_operations"] is True
    assert answer["cost"]["base_seconds"] > 0 < answer["cost"]["merged_seconds"]

    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


def test_command_measures_a_gguf_file(tied_dir, adapter_of, tmp_path, capsys, monkeypatch):
    """The file is a stub. test_import_base.py tests how a GGUF file is read."""
    path = tmp_path / "base.gguf"
    gguf.GGUFWriter(path, "llama").close()

    def import_base(*, source, kind, revision, target_dir):
        assert (source, kind) == (str(path), "gguf")
        shutil.copytree(tied_dir, target_dir)

    monkeypatch.setattr(merge, "_quantized_kinds", lambda _: [])
    monkeypatch.setattr(merge, "import_base", import_base)

    assert main([str(adapter_of(tied_dir)), str(path), str(tmp_path / "merged"), "--measure"]) == 0

    answer = json.loads(capsys.readouterr().out)
    assert answer["cost"]["same_layers"] is True
    assert answer["cost"]["base_seconds"] > 0 < answer["cost"]["merged_seconds"]


def test_command_reports_a_missing_file(tied_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()

    assert main([str(tmp_path / "empty"), str(tied_dir), str(tmp_path / "merged")]) == 1
    assert "adapter_config.json is missing" in capsys.readouterr().err

"""Rejections by verification, and its distinction between errors of the base, the files and the device."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.errors import BadAdapter, OutOfMemory
from lora_core.peft_format import verify
from lora_core.peft_format.verify import verify_export
from tests.lora_core.exports import snapshot, trained


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "probe.safetensors"])
def test_missing_or_damaged_files_are_rejected(exported, name):
    base, directory = exported
    (directory / name).write_bytes(b"\x80\x04 something else")
    with pytest.raises(BadAdapter):
        verify_export(base, directory)
    (directory / name).unlink()
    with pytest.raises(BadAdapter, match="missing"):
        verify_export(base, directory)


def test_adapter_that_requests_foreign_code_is_rejected(exported):
    base, directory = exported
    content = json.loads((directory / "adapter_config.json").read_text())
    content["auto_mapping"] = {"parent_library": "evil", "base_model_class": "Model"}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(BadAdapter, match="plain LoRA"):
        verify_export(base, directory)


def test_adapter_of_another_base_model_is_rejected(exported, load):
    with pytest.raises(BadAdapter):
        verify_export(load("gpt2"), exported[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_base_model_of_the_same_shape_fails_verification(load, tmp_path, dtype):
    base = load("llama", dtype)
    trained(base).export("job", tmp_path / "adapter", base_name="tiny")
    other = load("llama", dtype)
    for parameter in other.model.parameters():
        parameter.data = parameter.data + 0.02 * torch.sin(torch.arange(parameter.numel())).view(parameter.shape)

    assert verify_export(base, tmp_path / "adapter").passed
    assert not verify_export(other, tmp_path / "adapter").passed


def test_adapter_with_only_zero_logits_fails_with_an_explanation(exported, monkeypatch):
    base, folder = exported
    load_probe, last_logits = verify._load_probe, verify._last_logits

    def zeroed(*arguments):
        probe = load_probe(*arguments)
        return probe | {"logits": torch.zeros_like(probe["logits"])}

    monkeypatch.setattr(verify, "_load_probe", zeroed)
    monkeypatch.setattr(verify, "_last_logits", lambda *arguments: torch.zeros_like(last_logits(*arguments)))

    report = verify_export(base, folder)

    assert not report.passed
    assert "Every logit is zero" in report.explanation


def test_base_is_restored_if_peft_fails_midway(exported, monkeypatch):
    base, folder = exported
    before, load = snapshot(base), verify.PeftModel.from_pretrained

    def failing(*arguments, **options):
        load(*arguments, **options)
        raise ZeroDivisionError

    monkeypatch.setattr(verify.PeftModel, "from_pretrained", failing)
    with pytest.raises(ZeroDivisionError):
        verify_export(base, folder)

    assert snapshot(base) == before
    monkeypatch.undo()
    assert verify_export(base, folder).passed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), torch.AcceleratorError),
        (RuntimeError("Error(s) in loading state_dict: size mismatch"), BadAdapter),
    ],
)
def test_device_errors_while_peft_loads_are_not_attributed_to_the_adapter(exported, monkeypatch, error, expected):
    base, folder = exported

    def failing(*_arguments, **_options):
        raise error

    monkeypatch.setattr(verify.PeftModel, "from_pretrained", failing)

    with pytest.raises(expected):
        verify_export(base, folder)


def test_logits_are_compared_on_the_cpu_for_any_device(exported):
    base, folder = exported

    probe = verify._load_probe(replace(base, device="meta"), folder)

    assert {tensor.device.type for tensor in probe.values()} == {"cpu"}


def test_evidence_for_other_linears_than_peft_adapts_is_rejected(exported):
    base, directory = exported
    probe = load_file(directory / "probe.safetensors")
    del probe["added.model.layers.0.mlp.up_proj"]
    save_file(probe, directory / "probe.safetensors")

    with pytest.raises(BadAdapter, match="other layers than training did"):
        verify_export(base, directory)

"""The start-up probe says what this machine's kernels really do, and refuses models that mix sequences."""

import gc

import pytest
import torch

from lora_core import pack, probe
from lora_core.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import UnsupportedModel


@pytest.fixture
def probed_once() -> None:
    """Here each engine probes."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_thread_and_sizes_of_64_give_bitwise_equality(load, family, dtype):
    assert Engine(load(family, dtype), EngineConfig()).invariance == "bitwise"


def test_small_differences_are_called_allclose(load, monkeypatch):
    disturbed(monkeypatch, size=1e-4)
    assert Engine(load("llama"), EngineConfig()).invariance == "allclose"


def test_large_differences_are_refused(load, monkeypatch):
    disturbed(monkeypatch, size=0.5)
    with pytest.raises(UnsupportedModel, match="change with the packmates"):
        Engine(load("llama"), EngineConfig())


def test_attention_across_sequences_is_refused(load, monkeypatch):
    original = pack.build_pack

    def merged(slices, *, device):
        from dataclasses import replace

        whole = original(slices, device=device)
        return replace(whole, sequence_lengths=(whole.input_ids.shape[1],))

    monkeypatch.setattr("lora_core.export.build_pack", merged)
    with pytest.raises(UnsupportedModel, match="transformers' own"):
        Engine(load("llama"), EngineConfig())


def test_attention_to_later_tokens_is_refused(load):
    base = load("llama")
    for module in base.model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(UnsupportedModel, match="later tokens"):
        Engine(base, EngineConfig())


def disturbed(monkeypatch, *, size: float) -> None:
    """Kernels whose results change a little from call to call."""
    original, calls = probe._gradients, []

    def gradients(base, slices):
        calls.append(None)
        return [gradient * (1 + size * len(calls)) for gradient in original(base, slices)]

    monkeypatch.setattr(probe, "_gradients", gradients)


def test_a_probe_leaves_no_memory_and_no_trace_in_the_model(load):
    base = load("llama")
    Engine(base, EngineConfig())  # attached, and every cache of a library filled
    before = tensor_bytes()

    Engine(base, EngineConfig())

    assert tensor_bytes() == before
    assert base.attachment.anchor.grad is None
    assert all(parameter.grad is None for parameter in base.model.parameters())


def tensor_bytes() -> int:
    """Of all tensors that live."""
    gc.collect()
    living = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in living}.values())

"""The start-up probe reports the actual behavior of this machine's kernels and rejects models that mix sequences."""

import gc
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from lora_core.base_model.patching import Attachment
from lora_core.engine import invariance_probe
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import UnsupportedModel
from lora_core.kernels import batch_invariant
from lora_core.module_paths import layer_of
from lora_core.packing import packed_batch

MOST_ROWS = 128
"""Maximum rows of the probe's matmuls: its largest pack has 112 tokens, and the head processes 32 labels at a time."""


@pytest.fixture
def probed_once() -> None:
    """Overrides the shared fixture, so that each engine runs its own probe."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_thread_and_sizes_of_64_give_bitwise_equality(load, family, dtype):
    assert Engine(load(family, dtype), EngineConfig()).invariance == "bitwise"


@pytest.mark.parametrize("size", [1e-4, 0.2])
def test_small_differences_are_logged_and_reported_as_allclose(load, monkeypatch, caplog, size):
    disturbed(monkeypatch, size=size, losses=1e-4)

    with caplog.at_level("INFO", logger="lora_core.engine.invariance_probe"):
        engine = Engine(load("llama"), EngineConfig())

    assert engine.invariance == "allclose"
    (logged,) = (record.args for record in caplog.records if "of their norm" in record.msg)
    assert logged == pytest.approx((size,), rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_matmuls_are_reported_as_allclose_even_if_the_probe_is_equal(load, dtype, monkeypatch):
    linear, seen = batch_invariant.linear, []

    def changes_with_many_rows(x_TK, weight_NK, bias_N, exact, num_used=None):
        seen.append(len(x_TK))
        return linear(x_TK, weight_NK, bias_N, exact, num_used) * (1 if len(x_TK) <= MOST_ROWS else 1.01)

    monkeypatch.setattr(batch_invariant, "linear", changes_with_many_rows)

    engine = Engine(load("llama", dtype), EngineConfig(batch_invariant=False))

    assert max(seen) == MOST_ROWS
    assert engine.invariance == "allclose"


def test_several_threads_per_lane_are_reported_as_allclose(load):
    torch.set_num_threads(2)

    alone, dealt = (Engine(load("llama"), EngineConfig(num_lanes=number)) for number in (1, 2))

    assert (alone.invariance, dealt.invariance) == ("allclose", "bitwise")


@pytest.mark.parametrize(("gradients", "losses"), [(0.5, 0.5), (0.4, 0), (0, 0.4), (-2, 0)])
def test_large_differences_are_rejected(load, monkeypatch, gradients, losses):
    disturbed(monkeypatch, size=gradients, losses=losses)
    with pytest.raises(UnsupportedModel, match="depend on the other jobs"):
        Engine(load("llama"), EngineConfig())


def test_attention_across_sequences_is_rejected(load, monkeypatch):
    original = packed_batch.build_pack

    def merged(slices, *, device):
        from dataclasses import replace

        whole = original(slices, device=device)
        return replace(whole, sequence_lengths=(whole.input_ids.shape[1],))

    monkeypatch.setattr("lora_core.peft_format.export.build_pack", merged)
    with pytest.raises(UnsupportedModel, match="those of transformers"):
        Engine(load("llama"), EngineConfig())


def test_attention_to_later_tokens_is_rejected(load):
    base = load("llama")
    for module in base.model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with pytest.raises(UnsupportedModel, match="later tokens"):
        Engine(base, EngineConfig())


def disturbed(monkeypatch, *, size: float, losses: float) -> None:
    """Simulate kernels whose gradients and losses change by these fractions if jobs are packed."""
    original = invariance_probe._gradients

    def gradients(base, slices):
        found = original(base, slices)
        if len(slices) == 1:
            return found
        return [torch.cat([part[:-1] * (1 + size), part[-1:] * (1 + losses)]) for part in found]

    monkeypatch.setattr(invariance_probe, "_gradients", gradients)


def test_probe_leaves_no_memory_and_no_trace_in_the_model(load):
    base = load("llama")
    Engine(base, EngineConfig())  # attaches the base, and fills all library caches
    before = tensor_bytes()

    Engine(base, EngineConfig())

    assert tensor_bytes() == before
    assert base.attachment.leaf.grad is None
    assert all(parameter.grad is None for parameter in base.model.parameters())


def tensor_bytes() -> int:
    """Return the bytes of all live tensors."""
    gc.collect()
    living = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in living}.values())


def test_probe_adapts_a_block_of_each_kind_and_one_below_it():
    alike = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=6))
    unlike = Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, num_hidden_layers=8, layer_types=["sliding_attention"] * 3 + KINDS)
    )

    adapted = {model: {layer_of(name) for name in representative(model)} for model in (alike, unlike)}

    assert adapted == {alike: {4, 5}, unlike: {4, 5, 6, 7}}


def test_probe_adapts_linears_that_are_in_no_block():
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=64,
            ffn_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    )

    assert {layer_of(name) for name in representative(model)} == {None, 2, 3}


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]


def representative(model: PreTrainedModel) -> list[str]:
    return list(invariance_probe.representative_linears(Attachment(model)))

"""The rotation kernel gives the library's values. Only attached models whose rotation agrees use it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, GPTNeoXConfig, LlamaConfig, PreTrainedModel
from transformers.models.cohere.modeling_cohere import CohereForCausalLM
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from lora_core.base_model.patching import Attachment
from lora_core.kernels import elementwise
from lora_core.kernels.selection import Kernels
from lora_core.layers import rotary
from lora_core.layers.rotary import Rotate, faster_rotations
from lora_core.packing.packed_batch import PackedBatch, running

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ORIGINALS: dict[str, Any] = {
    "whole": modeling_llama.apply_rotary_pos_emb,
    "part": modeling_gpt_neox.apply_rotary_pos_emb,
}


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(num_tokens: int, rotated: int, dtype: torch.dtype, by_token: bool) -> list[Tensor]:
    """Return query [1, 6, T, 20] and key [1, 2, T, 20], stored by token or by head, cos and sin."""
    heads = []
    for seed, count in ((1, 6), (2, 2)):
        x = drawn(1, num_tokens, count, 20, seed=seed, dtype=dtype).transpose(1, 2)
        heads.append((x if by_token else x.contiguous()).requires_grad_())
    return [*heads, *(drawn(1, num_tokens, rotated, seed=seed, dtype=dtype) for seed in (3, 4))]


def with_gradients(rotate: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    query, key = rotate(*tensors)
    received = [drawn(*x.shape, seed=seed, dtype=x.dtype) for seed, x in ((5, query), (6, key))]
    return [query.detach(), key.detach(), *torch.autograd.grad([query, key], tensors[:2], received)]


@pytest.mark.parametrize("by_token", [True, False], ids=["by token", "by head"])
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 17])
@pytest.mark.parametrize(("kind", "rotated"), [("whole", 20), ("part", 6)])
def test_values_and_gradients_equal_those_of_the_library(kind, rotated, num_tokens, by_token):
    tensors = inputs(num_tokens, rotated, torch.float32, by_token)

    found = with_gradients(Rotate.apply, tensors)

    for ours, theirs in zip(found, with_gradients(ORIGINALS[kind], tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_bfloat16_values_have_the_library_bits_and_gradients_round_once():
    tensors = inputs(17, 20, torch.bfloat16, by_token=True)
    exact = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]

    found = with_gradients(Rotate.apply, tensors)

    theirs = with_gradients(ORIGINALS["whole"], tensors)
    assert torch.equal(found[0], theirs[0])
    assert torch.equal(found[1], theirs[1])
    received = [drawn(*x.shape, seed=seed, dtype=torch.bfloat16).float() for seed, x in ((5, exact[0]), (6, exact[1]))]
    slopes = torch.autograd.grad(ORIGINALS["whole"](*exact), exact[:2], received)
    for ours, slope in zip(found[2:], slopes, strict=True):
        assert torch.equal(ours, slope.bfloat16())


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False).eval()


def pass_of(model: PreTrainedModel, pack: PackedBatch | None = None) -> None:
    ids = torch.arange(16)[None]
    if pack is None:
        model(ids, use_cache=False)
    else:
        with running(pack, Kernels()):
            model.base_model(ids, use_cache=False)


def pack_of_one() -> PackedBatch:
    none = torch.zeros(0)
    return PackedBatch(
        input_ids=torch.arange(16)[None],
        position_ids=torch.arange(16)[None],
        sequence_lengths=(16,),
        sequence_bounds_S=torch.tensor([0, 16], dtype=torch.int32),
        segments=(),
        label_positions_L=none,
        labels_L=none,
        label_weights_L=none,
        host_ids_T=np.arange(16),
    )


def test_only_a_running_pack_of_an_attached_model_uses_the_kernel(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(elementwise, "rotate", lambda *_: calls.append("ours"))
    original = modeling_llama.apply_rotary_pos_emb
    attached, neighbor = llama(), llama()
    monkeypatch.setattr(rotary, "_agrees", lambda *_: True)
    attachment = Attachment(attached)

    pass_of(attached)
    pass_of(neighbor)
    assert calls == []

    pass_of(attached, pack_of_one())
    assert calls == ["ours"] * 4  # queries and keys of two layers
    attachment.detach()
    with running(pack_of_one(), Kernels()):
        neighbor(torch.arange(16)[None], use_cache=False)
        attached(torch.arange(16)[None], use_cache=False)

    assert calls == ["ours"] * 4
    assert modeling_llama.apply_rotary_pos_emb is original
    assert not [module for module in attached.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_families_with_the_same_rotation_are_replaced(dtype):
    interleaved = CohereForCausalLM(CohereConfig(**SIZES, pad_token_id=0, eos_token_id=1, bos_token_id=2))
    partial = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))

    assert len(faster_rotations(llama().to(dtype))) == 2
    assert len(faster_rotations(partial.to(dtype))) == 2
    assert faster_rotations(interleaved.to(dtype)) == []


def rotated_at_the_end(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate full heads like the library, but partial ones at their last features instead of their first."""
    kept = query.shape[-1] - cos.shape[-1]
    turned = modeling_llama.apply_rotary_pos_emb(query[..., kept:], key[..., kept:], cos, sin)
    return torch.cat([query[..., :kept], turned[0]], -1), torch.cat([key[..., :kept], turned[1]], -1)


@pytest.mark.parametrize(("share", "is_ours"), [(1.0, True), (0.25, False)])
def test_family_is_checked_with_its_rotated_part_of_a_head(monkeypatch, share, is_ours):
    monkeypatch.setattr(modeling_gpt_neox, "apply_rotary_pos_emb", rotated_at_the_end)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES | {"rotary_pct": share})).requires_grad_(False).eval()
    Attachment(model)
    calls: list[str] = []
    monkeypatch.setattr(elementwise, "rotate", lambda *_: calls.append("ours"))

    pass_of(model, pack_of_one())

    assert bool(calls) is is_ours

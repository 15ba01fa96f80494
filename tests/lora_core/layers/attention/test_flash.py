"""Attention of all sequences at once: the arguments of the GPU kernel, and equality with each sequence alone.

The kernel itself needs a GPU. varlen_stand_in.py computes what torch documents.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.config import LoraConfig
from lora_core.forward.language_model import hidden_states
from lora_core.kernels import selection
from lora_core.kernels.selection import Kernels, choose_kernels
from lora_core.layers.attention import flash
from lora_core.layers.attention.flash import window_size
from lora_core.layers.attention.packed import packed_attention
from lora_core.packing.packed_batch import PackedBatch, SliceInput, build_pack, running
from tests.lora_core.varlen_stand_in import StandIn

H, K, E = 4, 2, 8
LENGTHS = (5, 1, 20, 6)  # 32 in total: no padding


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(flash, "kernel", lambda: made)
    return made


def pack_of(lengths: tuple[int, ...], adapter: FlatAdapter | None = None) -> PackedBatch:
    adapter = adapter or FlatAdapter((), LoraConfig(rank=1, alpha=1), dtype=torch.bfloat16, device="cpu")
    sequences = tuple((np.arange(length, dtype=np.int32), np.zeros(length, np.uint8)) for length in lengths)
    return build_pack([SliceInput(adapter=adapter, sequences=sequences, label_weight=0.0, dropout=None)], device="cpu")


def attended(inputs: list[Tensor], choice: Kernels, **options: Any) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    q, k, v = (part.clone().requires_grad_() for part in inputs)
    with running(pack_of(LENGTHS), choice):
        output, _ = packed_attention(nn.Module(), q, k, v, None, scaling=0.4, **options)
    output.float().square().sum().backward()
    return [output.detach(), *(part.grad for part in (q, k, v) if part.grad is not None)]


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "sliding_window": 4},
        {"is_causal": True, "sliding_window": 99},
        {"is_causal": False},
        {"is_causal": False, "sliding_window": 3},
    ],
)
def test_all_sequences_at_once_equal_each_sequence_alone(stand_in: StandIn, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, sum(LENGTHS), E).bfloat16() for heads in (H, K, K)]

    alone = attended(inputs, Kernels(), **options)
    together = attended(inputs, Kernels(attention="varlen"), **options)

    assert len(stand_in.calls) == 1
    for expected, found in zip(alone, together, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_kernel_gets_int32_bounds_scale_and_grouped_heads(stand_in: StandIn) -> None:
    inputs = [torch.randn(1, heads, sum(LENGTHS), E).bfloat16() for heads in (H, K, K)]

    attended(inputs, Kernels(attention="varlen"), is_causal=True, sliding_window=4)

    assert stand_in.calls == [
        {
            "bounds": [0, 5, 6, 26, 32],
            "dtype": torch.int32,
            "longest": 20,
            "scale": 0.4,
            "window_size": (3, 0),
            "enable_gqa": True,
        }
    ]


def test_window_includes_the_query_token_and_is_passed_only_if_needed() -> None:
    assert window_size(causal=True, window=None, longest=9) == (-1, 0)
    assert window_size(causal=True, window=9, longest=9) == (-1, 0)
    assert window_size(causal=True, window=8, longest=9) == (7, 0)
    assert window_size(causal=False, window=8, longest=9) == (7, 7)
    assert window_size(causal=False, window=None, longest=9) == (-1, -1)


@pytest.mark.parametrize(
    ("width", "dtype", "softcap"),
    [(8, torch.bfloat16, 30.0), (12, torch.bfloat16, None), (264, torch.bfloat16, None), (8, torch.float32, None)],
)
def test_unsupported_attention_runs_sequence_by_sequence(
    stand_in: StandIn, width: int, dtype: torch.dtype, softcap: float | None
) -> None:
    inputs = [torch.randn(1, heads, sum(LENGTHS), width).to(dtype) for heads in (H, K, K)]

    attended(inputs, Kernels(attention="varlen"), is_causal=True, softcap=softcap)

    assert stand_in.calls == []


def test_pass_calls_the_kernel_once_per_layer_with_equal_states(
    load: Callable[..., BaseModel], stand_in: StandIn
) -> None:
    base = load("llama", "bfloat16")
    lengths = (7, 12, 3)  # 22 in total: 10 padding tokens
    states = {}

    for attention in ("sequences", "varlen"):
        base.attachment = Attachment(base.model, Kernels(attention=attention))
        with torch.no_grad():
            states[attention] = hidden_states(base, pack_of(lengths))
        base.attachment.detach()

    assert [call["bounds"] for call in stand_in.calls] == [[0, 7, 19, 22, 32]] * 2
    torch.testing.assert_close(states["varlen"], states["sequences"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("checks_heads", [True, False])
def test_grouped_heads_are_allowed_where_torch_asks(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, checks_heads: bool
) -> None:
    monkeypatch.setattr(flash, "_checks_heads", lambda: checks_heads)
    inputs = [torch.randn(1, heads, sum(LENGTHS), E).bfloat16() for heads in (H, K, K)]

    attended(inputs, Kernels(attention="varlen"), is_causal=True)

    (call,) = stand_in.calls
    assert call.get("enable_gqa", "not passed") == (True if checks_heads else "not passed")


def test_cpu_never_uses_the_varlen_kernel() -> None:
    assert choose_kernels(torch.device("cpu"), torch.bfloat16).attention == "sequences"


@pytest.mark.parametrize(
    ("capability", "dtype", "torch_has_it", "reason"),
    [
        ((9, 0), torch.bfloat16, True, None),
        ((8, 0), torch.bfloat16, True, None),
        ((7, 5), torch.bfloat16, True, "compute capability 8.0, not 7.5"),
        ((9, 0), torch.float32, True, "bfloat16"),
        ((9, 0), torch.bfloat16, False, "needs torch 2.11"),
    ],
)
def test_gpu_uses_the_varlen_kernel_or_reports_a_reason(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    torch_has_it: bool,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(selection, "reason_against", lambda *_, **__: None)
    if not torch_has_it:
        monkeypatch.setattr(selection, "VARLEN_PARAMETERS", {"a parameter of a later torch"})

    chosen = choose_kernels(torch.device("cuda:0"), dtype)

    assert chosen.attention == ("varlen" if reason is None else "sequences")
    found = [sentence for sentence in chosen.reasons if sentence.startswith("attention")]
    assert len(found) == (reason is not None)
    assert all(reason in sentence for sentence in found if reason)

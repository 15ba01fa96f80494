# pyright: basic
"""Tests the decoding kernel on a device, before an engine uses it, against torch operations in fp32.

Shape suffixes: n answers, H query heads, K key heads, G = H / K, S tokens of an answer, E head features.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lora_core.kernels.gpu.attention_trial import ALL, AMPERE, TOLERANCE, VisibleKeys
from lora_core.kernels.gpu.trial_failures import failure_of
from lora_core.kernels.gpu.trial_inputs import numbers
from lora_core.runtime.transfers import upload

WIDEST_HEAD = 256
K, G = 2, 17
"""More query heads for a key head than a program computes."""
NUM_OLDER = (1, 16, 150)
"""Tokens in the cache of each answer: one has several tiles."""
CAPACITY = 160
REACHES = (ALL, 40)
"""How many tokens before its own the new token sees."""
LOOP = "attention of generated tokens runs answer by answer"


def why_not_decoded(device: torch.device, dtype: torch.dtype, *, size: int, is_capped: bool) -> str | None:
    """Return why the kernel can't compute heads of `size` features on this CUDA device, or None."""
    capability = torch.cuda.get_device_capability(device)
    if size > WIDEST_HEAD or dtype not in TOLERANCE:
        return f"{LOOP}: the Triton kernel does not take heads of {size} features in {dtype}"
    if dtype == torch.bfloat16 and capability < AMPERE:
        return f"{LOOP}: the Triton kernel needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    return why_decoding_differs(device, dtype, size=size, is_capped=is_capped)


@cache
@torch.no_grad()
def why_decoding_differs(device: torch.device, dtype: torch.dtype, *, size: int, is_capped: bool) -> str | None:
    """Return how the kernel differs from the reference on this device, or None if they agree.

    Later calls read the result. Raises torch.AcceleratorError if the device can't be used any more.
    """
    try:
        for name, found, expected in decoding_results(device, dtype, size=size, is_capped=is_capped):
            difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
            if not difference <= TOLERANCE[dtype]:
                return f"{LOOP}: {name} of the Triton kernel differs by {difference:.1e} of its largest number"
    except Exception as error:  # noqa: BLE001  (Triton's errors have no other base class)
        return f"{LOOP}: {failure_of(error, device)}"
    return None


def decoding_results(
    device: torch.device, dtype: torch.dtype, *, size: int, is_capped: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each result, what the kernel computes, and the reference in fp32.

    Each cache contains NaN behind its tokens, which must stay there. Results have 0 instead.
    """
    from lora_core.kernels.gpu import decoding

    query, key, value = (
        numbers((len(NUM_OLDER), heads, size), seed, device).to(dtype).transpose(0, 1)
        for seed, heads in enumerate((K * G, K, K))
    )
    for before in REACHES:
        visible = VisibleKeys(scale=4 * size**-0.5, softcap=2.0 if is_capped else 0.0, before=before, after=0)
        buffers = [
            (_filled(older, size, 3 + older, device, dtype), _filled(older, size, 4 + older, device, dtype))
            for older in NUM_OLDER
        ]
        expected = [
            (_with_row(keys, older, key[:, n]), _with_row(values, older, value[:, n]))
            for n, ((keys, values), older) in enumerate(zip(buffers, NUM_OLDER, strict=True))
        ]
        y_nHE = decoding.attend_newest((query, key, value), _table(buffers, device), visible)
        for n, older in enumerate(NUM_OLDER):
            keys, values = (part[:, : older + 1].float() for part in expected[n])
            yield f"attention to {older + 1} tokens", y_nHE[n], reference(query[:, n].float(), keys, values, visible)
            for name, found, wanted in zip(("keys", "values"), buffers[n], expected[n], strict=True):
                yield f"the cache of {name}", found.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0)


def reference(q_HE: Tensor, k_KSE: Tensor, v_KSE: Tensor, visible: VisibleKeys) -> Tensor:
    """Return y [H, E] of the newest of S tokens."""
    first = max(k_KSE.shape[1] - 1 - visible.before, 0)
    q_KGE = q_HE.view(len(k_KSE), -1, q_HE.shape[-1])
    scores_KGS = q_KGE @ k_KSE[:, first:].transpose(1, 2) * visible.scale
    if visible.softcap:
        scores_KGS = torch.tanh(scores_KGS / visible.softcap) * visible.softcap
    return (torch.softmax(scores_KGS, -1) @ v_KSE[:, first:]).flatten(0, 1)


def _table(buffers: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Return the addresses of the buffers as in a SequenceCache, int64 [n, 4]."""
    rows = [
        (keys.data_ptr(), values.data_ptr(), CAPACITY, older)
        for (keys, values), older in zip(buffers, NUM_OLDER, strict=True)
    ]
    return upload([np.array(rows, np.int64)], device)[0]


def _filled(num_tokens: int, size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a buffer [K, CAPACITY, E] whose first tokens have numbers, and the others NaN."""
    buffer = torch.full((K, CAPACITY, size), torch.nan, dtype=dtype, device=device)
    buffer[:, :num_tokens] = numbers((K, num_tokens, size), seed, device).to(dtype)
    return buffer


def _with_row(buffer: Tensor, place: int, row_KE: Tensor) -> Tensor:
    """Return a copy of the buffer with another token."""
    copy = buffer.clone()
    copy[:, place] = row_KE
    return copy

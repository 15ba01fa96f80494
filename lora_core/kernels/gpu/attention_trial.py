# pyright: basic
"""Tests the attention kernels on a device, before an engine uses them, against torch operations in fp32.

Shape suffixes: H query heads, K key heads, T tokens of the pack, E head features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from lora_core.kernels.gpu.trial_failures import failure_of
from lora_core.kernels.gpu.trial_inputs import numbers

AMPERE = (8, 0)
"""Minimum compute capability for bfloat16: earlier ones do not multiply it."""
TILED_HEADS = {torch.bfloat16: 256, torch.float32: 128}
"""Most features of a head, by dtype. Wider heads in fp32 would spill registers."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest difference, as a fraction of the reference's largest number."""
H, K = 4, 2
LENGTHS = (7, 80, 1)
"""Tokens of each sequence: one has more than a tile."""
ALL = 1 << 30
REACHES = ((ALL, 0), (20, 0), (20, 20), (ALL, ALL))
"""How many tokens before and after its own a query sees."""
SEQUENCES = "attention runs sequence by sequence"


@dataclass(frozen=True, kw_only=True, slots=True)
class VisibleKeys:
    """How queries score keys, and which ones they see. A `softcap` of 0 stands for none."""

    scale: float
    softcap: float
    before: int
    after: int

    @property
    def numbers(self) -> tuple[float, float, float, int, int]:
        """Return the arguments of the kernels. The first is the factor of q kᵀ inside of tanh."""
        inner = self.scale / self.softcap if self.softcap else self.scale
        return inner, self.scale, self.softcap, self.before, self.after


def why_not_in_tiles(device: torch.device, dtype: torch.dtype, *, size: int, is_capped: bool) -> str | None:
    """Return why the kernels can't compute heads of `size` features on this CUDA device, or None."""
    capability = torch.cuda.get_device_capability(device)
    if size > TILED_HEADS.get(dtype, 0):
        return f"{SEQUENCES}: the Triton kernels do not take heads of {size} features in {dtype}"
    if dtype == torch.bfloat16 and capability < AMPERE:
        return f"{SEQUENCES}: the Triton kernels need compute capability 8.0, not {capability[0]}.{capability[1]}"
    return why_attention_differs(device, dtype, size=size, is_capped=is_capped)


@cache
@torch.enable_grad()  # the first call may come from a pass without gradients
def why_attention_differs(device: torch.device, dtype: torch.dtype, *, size: int, is_capped: bool) -> str | None:
    """Return how the kernels differ from the reference on this device, or None if they agree.

    Later calls read the result. Raises torch.AcceleratorError if the device can't be used any more.
    """
    try:
        for name, found, expected in attention_results(device, dtype, size=size, is_capped=is_capped):
            difference = float((found.float() - expected).abs().max() / expected.abs().max())
            if not difference <= TOLERANCE[dtype]:
                return f"{SEQUENCES}: {name} of the Triton kernels differs by {difference:.1e} of its largest number"
    except Exception as error:  # noqa: BLE001  (Triton's errors have no other base class)
        return f"{SEQUENCES}: {failure_of(error, device)}"
    return None


def attention_results(
    device: torch.device, dtype: torch.dtype, *, size: int, is_capped: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each result, what its kernel computes, and the reference in fp32."""
    from lora_core.kernels.gpu import attention

    num_tokens, longest = sum(LENGTHS), max(LENGTHS)
    bounds_S = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    heads = [
        numbers((num_tokens, count, size), seed, device).transpose(0, 1).to(dtype)
        for seed, count in enumerate((H, K, K))
    ]
    dy_THE = numbers((num_tokens, H, size), 3, device).to(dtype)
    for before, after in REACHES:
        visible = VisibleKeys(scale=4 * size**-0.5, softcap=2.0 if is_capped else 0.0, before=before, after=after)
        y_THE, logs_HT = attention.attend(heads, bounds_S, longest, visible)
        made = attention.attend_backward(dy_THE, heads, y_THE, logs_HT, bounds_S, longest, visible)
        leaves = [part.float().requires_grad_() for part in heads]
        expected_THE = reference(leaves, LENGTHS, visible)
        gradients = torch.autograd.grad(expected_THE, leaves, dy_THE.float())
        yield "attention", y_THE, expected_THE.detach()
        for name, found, expected in zip(("queries", "keys", "values"), made, gradients, strict=True):
            yield f"the gradient of {name}", found, expected.transpose(0, 1)


def reference(heads: Sequence[Tensor], lengths: Sequence[int], visible: VisibleKeys) -> Tensor:
    """Return y [T, H, E] in the dtype of the heads q [H, T, E], k and v [K, T, E], one sequence after another."""
    query, key, value = heads
    num_groups, outputs, start = len(query) // len(key), [], 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        k_HSE, v_HSE = (part[:, rows].repeat_interleave(num_groups, 0) for part in (key, value))
        scores_HSS = query[:, rows] @ k_HSE.transpose(1, 2) * visible.scale
        if visible.softcap:
            scores_HSS = torch.tanh(scores_HSS / visible.softcap) * visible.softcap
        place_S = torch.arange(length, device=query.device)
        distance_SS = place_S[:, None] - place_S
        seen_SS = (distance_SS <= visible.before) & (-distance_SS <= visible.after)
        weights_HSS = torch.softmax(scores_HSS.masked_fill(~seen_SS, float("-inf")), -1)
        outputs.append((weights_HSS @ v_HSE).transpose(0, 1))
    return torch.cat(outputs)

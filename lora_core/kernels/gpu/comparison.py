# pyright: basic
"""Compares the Triton kernels with torch operations on a device, once, before an engine uses them there.

A comparison computes one small case of each family: the variants that most jobs use. It finds a device, a driver or a
compiler that can't run the kernels, or that runs them wrong. The tests compare every variant with its reference
(tests/lora_core/kernels/gpu/interpreted). Shape suffixes: T tokens, D features, O output features, H query heads, K key
heads, Q queries, S tokens of a sequence, n answers, E head features.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, chain
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels.gpu.optimizer_table import AdamwStep
from lora_core.kernels.gpu.tables import ENTRY, Member, class_of, group_of, tables_of
from lora_core.kernels.gpu.tiled_run import TiledRun
from lora_core.kernels.gpu.visible_keys import TILED_HEADS, VisibleKeys
from lora_core.runtime.counter_rng import coin_flips, philox_key, uniform_within
from lora_core.runtime.device_errors import is_shortage
from lora_core.runtime.transfers import upload

Family = Literal["lora", "attention", "decoding", "elementwise"]
INSTEAD: dict[Family, str] = {
    "lora": "LoRA runs segment by segment",
    "attention": "attention runs sequence by sequence",
    "decoding": "attention of generated tokens runs answer by answer",
    "elementwise": "norms, losses and optimizer steps run operation by operation, and the host draws random numbers",
}
"""The fallback of an engine without the kernels of a family."""
WIDEST_HEAD: dict[Family, dict[torch.dtype, int]] = {
    "lora": {torch.bfloat16: 0},
    "attention": TILED_HEADS,
    "decoding": {torch.bfloat16: 256, torch.float32: 256},
}
"""The dtypes that a family takes, and its most features of a head. Other families take bf16 and fp32."""
AMPERE = (8, 0)
"""Minimum compute capability of matrix products in bf16."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest difference, as a fraction of the reference's largest number."""
EPSILON = 1e-6
Results = Iterator[tuple[str, Tensor, Tensor]]
"""Name of a result, what the kernel computes, and the reference."""

_refused: dict[torch.device, str] = {}
"""Why elementwise kernels can't be used on a device of this process, although they agree there."""


def reason_against(
    family: Family, device: torch.device, dtype: torch.dtype | None = None, *, size: int = 0, is_capped: bool = False
) -> str | None:
    """Return why the kernels of a family can't be used on a CUDA device, or None. Later calls read the result.

    Args:
        dtype: That of the base model. None: all that the kernels take.
        size, is_capped: Features of an attention head, and whether its scores have a cap.

    Raises torch.AcceleratorError if the device can't be used any more, and an error if memory runs out.
    """
    dtypes = TOLERANCE if dtype is None else (dtype,)
    reason = next(filter(None, (compare(family, device, each, size, is_capped) for each in dtypes)), None)
    return _refused.get(device) if reason is None and family == "elementwise" else reason


def agree(device: torch.device, gathered: Callable[[str | None], list[str | None]]) -> None:
    """Use the elementwise kernels only if all ranks can: otherwise an optimizer step would have other bits, and an
    initialization would take another number of ticks. `gathered` returns the value of every rank."""
    own = reason_against("elementwise", device)
    reason = next(filter(None, gathered(own)), None)
    if own is None and reason is not None:
        _refused[device] = f"{reason}, on another rank"


@cache
@torch.enable_grad()  # the first call may come from a pass without gradients
def compare(family: Family, device: torch.device, dtype: torch.dtype, size: int, is_capped: bool) -> str | None:
    """Return why a family can't be used, or None. Arguments and errors as in `reason_against`."""
    heads = f" heads of {size} features in" if size else ""
    if size > WIDEST_HEAD.get(family, TOLERANCE).get(dtype, -1):
        return f"{INSTEAD[family]}: the Triton kernels do not take{heads} {dtype}"
    if family in WIDEST_HEAD and dtype == torch.bfloat16:
        capability = torch.cuda.get_device_capability(device)
        if capability < AMPERE:
            major, minor = capability
            return f"{INSTEAD[family]}: the Triton kernels need compute capability 8.0, not {major}.{minor}"
    try:
        for name, found, expected in results(family, device, dtype, size, is_capped):
            difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
            if not difference <= TOLERANCE[dtype]:
                differs = f"{name} of the Triton kernels differs by {difference:.1e} of its largest number"
                return f"{INSTEAD[family]}: {differs}"
    except ImportError as error:
        return f"{INSTEAD[family]}: Triton is not installed ({error})"
    except Exception as error:  # Triton's errors have no other base class
        if is_shortage(error):
            raise  # it proves nothing about the kernels
        _require_usable(device)
        return f"{INSTEAD[family]}: a Triton kernel failed ({str(error).strip().partition(chr(10))[0]})"
    return None


def _require_usable(device: torch.device) -> None:
    """Raise torch.AcceleratorError if a kernel made the device unusable for this process, for example by an access to
    unmapped memory: every later call would fail, whatever computes it."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as fault:
        fault.add_note(f"A comparison of Triton kernels failed. This process can't use {device} any more.")
        raise


def results(family: Family, device: torch.device, dtype: torch.dtype, size: int, is_capped: bool) -> Results:
    """Compute the case of a family. The arguments are those of `compare`."""
    softcap = 2.0 if is_capped else 0.0
    match family:
        case "lora":
            return _lora(device, dtype)
        case "attention":
            return _attention(device, dtype, size, softcap)
        case "decoding":
            return _decoding(device, dtype, size, softcap)
        case "elementwise":
            return chain(_rows(device, dtype), _loss(device, dtype), _step(device, dtype), _random_numbers(device))


def _lora(device: torch.device, dtype: torch.dtype) -> Results:
    """Compute two segments of three linears with the same input. One segment has more rows than a tile."""
    bounds, outputs, rank, num_features, scale = ((0, 7), (7, 80)), (208, 80, 144), 16, 272, 0.5
    x_TD = _numbers((80, num_features), 0, device, dtype)
    gradients = [_numbers((80, num_outputs), 1, device, dtype) for num_outputs in outputs]
    entries, members = np.zeros((len(outputs), len(bounds)), ENTRY), list[Member]()
    weights, made = list[Tensor](), list[Tensor]()
    for sibling, num_outputs in enumerate(outputs):
        for segment, (start, stop) in enumerate(bounds):
            shapes = ((rank, num_features), (num_outputs, rank))
            weights += [_numbers(shape, len(members), device, dtype) for shape in shapes]
            made += [torch.zeros(shape, device=device) for shape in shapes]
            addresses = (matrix.data_ptr() for matrix in (*weights[-2:], *made[-2:]))
            entries[sibling, segment] = (*addresses, rank, rank, scale, 0, 1.0, 0, (0, 0))
            members.append(Member(segment=segment, sibling=sibling, entry=len(members), start=start, stop=stop))
    uploaded, *tables = upload([entries.view(np.int64), *tables_of(members)], device)
    group = group_of(class_of(rank, has_dropout=False), members, tables, num_siblings=len(outputs))
    run, y = TiledRun(entries=uploaded, group=group), [torch.zeros_like(dy_TO) for dy_TO in gradients]
    dx_TD = torch.zeros_like(x_TD)
    run.add_gradients(dx_TD, gradients, x_TD, run.add(y, x_TD))

    def reference(x_TD: Tensor, *weights: Tensor) -> Tensor:
        parts = [
            scale * x_TD[member.start : member.stop] @ weights[2 * index].T @ weights[2 * index + 1].T
            for index, member in enumerate(members)
        ]
        return torch.cat(
            [torch.cat(parts[first : first + len(bounds)]) for first in range(0, len(parts), len(bounds))], dim=1
        )

    names = ("y", "dx", *(f"d{matrix} of linear {member.sibling}" for member in members for matrix in "AB"))
    expected = _differentiated(reference, [x_TD, *weights], torch.cat(gradients, dim=1))
    yield from zip(names, [torch.cat(y, dim=1), dx_TD, *made], expected, strict=True)


def _attention(device: torch.device, dtype: torch.dtype, size: int, softcap: float) -> Results:
    """Compute causal attention within a window. One sequence has more than a tile."""
    from lora_core.kernels.gpu import attention

    lengths, num_tokens, counts = (7, 80, 1), 88, (4, 2, 2)
    heads = [
        _numbers((num_tokens, count, size), seed, device, dtype).transpose(0, 1) for seed, count in enumerate(counts)
    ]
    dy_THE = _numbers((num_tokens, 4, size), 3, device, dtype)
    bounds_S = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    visible = VisibleKeys(scale=4 * size**-0.5, softcap=softcap, before=20, after=0)
    y_THE, logs_HT = attention.attend(heads, bounds_S, max(lengths), visible)
    dq, dk, dv = attention.attend_backward(dy_THE, heads, y_THE, logs_HT, bounds_S, max(lengths), visible)

    def reference(*heads: Tensor) -> Tensor:
        sequences = zip(*(part.split(lengths, dim=1) for part in heads), strict=True)
        return torch.cat([attended(q, k, v, visible) for q, k, v in sequences])

    names = ("attention", "the gradient of queries", "the gradient of keys", "the gradient of values")
    found = (y_THE, dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1))
    yield from zip(names, found, _differentiated(reference, heads, dy_THE), strict=True)


def _decoding(device: torch.device, dtype: torch.dtype, size: int, softcap: float) -> Results:
    """Compute the newest tokens of two answers. The cache of one has several tiles."""
    from lora_core.kernels.gpu import decoding

    lengths, capacity, counts = (1, 150), 160, (8, 2, 2)
    query, *newest = (
        _numbers((2, count, size), seed, device, dtype).transpose(0, 1) for seed, count in enumerate(counts)
    )
    caches = [[_numbers((2, capacity, size), seed + n, device, dtype) for seed in (3, 5)] for n in range(2)]
    wanted = [[buffer.clone() for buffer in cache] for cache in caches]
    rows = [(*(buffer.data_ptr() for buffer in caches[n]), capacity, length) for n, length in enumerate(lengths)]
    visible = VisibleKeys(scale=4 * size**-0.5, softcap=softcap, before=40, after=0)
    y_nHE = decoding.attend_newest((query, *newest), upload([np.array(rows, np.int64)], device)[0], visible)
    for n, length in enumerate(lengths):
        for buffer, row in zip(wanted[n], newest, strict=True):
            buffer[:, length] = row[:, n]
        keys, values = (buffer[:, : length + 1].float() for buffer in wanted[n])
        yield (
            f"attention to {length + 1} tokens",
            y_nHE[n],
            attended(query[:, n, None].float(), keys, values, visible)[0],
        )
        yield from zip(("the cache of keys", "the cache of values"), caches[n], wanted[n], strict=True)


def attended(q_HQE: Tensor, k_KSE: Tensor, v_KSE: Tensor, visible: VisibleKeys) -> Tensor:
    """Return the attention [Q, H, E] of the last Q of S tokens, in the dtype of the arguments."""
    (num_heads, num_queries, _), (num_key_heads, length, _) = q_HQE.shape, k_KSE.shape
    k_HSE, v_HSE = (part.repeat_interleave(num_heads // num_key_heads, 0) for part in (k_KSE, v_KSE))
    scores_HQS = q_HQE @ k_HSE.transpose(1, 2) * visible.scale
    if visible.softcap:
        scores_HQS = torch.tanh(scores_HQS / visible.softcap) * visible.softcap
    place_S = torch.arange(length, device=q_HQE.device)
    distance_QS = place_S[length - num_queries :, None] - place_S
    seen_QS = (distance_QS <= visible.before) & (-distance_QS <= visible.after)
    return (torch.softmax(scores_HQS.masked_fill(~seen_QS, float("-inf")), -1) @ v_HSE).transpose(0, 1)


def _rows(device: torch.device, dtype: torch.dtype) -> Results:
    """Compute a gated activation, a norm of a residual sum, and a rotation of whole heads."""
    from lora_core.kernels.gpu import elementwise

    gate, up, dy = (_numbers((240,), seed, device, dtype) for seed in (1, 2, 3))
    y, dgate, dup = (torch.empty_like(gate) for _ in range(3))
    elementwise.swiglu(gate, up, y)
    elementwise.swiglu_backward(gate, up, dy, dgate, dup)
    names = ("silu(gate) · up", "the gradient of gate", "the gradient of up")
    expected = _differentiated(lambda gate, up: F.silu(gate) * up, [gate, up], dy)
    yield from zip(names, (y, dgate, dup), expected, strict=True)

    shape = (5, 4096)  # several warps add up a row
    x, delta, dy, onward = (_numbers(shape, seed, device, dtype) for seed in (4, 5, 6, 7))
    weight, rate = _numbers(shape[1:], 8, device, dtype), torch.empty(shape[0], device=device)
    total, y, again, dx = (torch.empty_like(x) for _ in range(4))
    elementwise.add_rms_norm(x, delta, weight, EPSILON, total, y, rate)
    elementwise.rms_norm_with_rate(total, rate, weight, again)
    elementwise.rms_norm_backward(total, rate, weight, dy, onward, dx)
    normed, gradient = _differentiated(lambda total: F.rms_norm(total, shape[1:], weight.float(), EPSILON), [total], dy)
    yield "the residual sum", total, x.float() + delta.float()
    yield "RMSNorm", y, normed
    yield "the recomputed RMSNorm", again, normed
    yield "the gradient of RMSNorm and of its sum", dx, gradient + onward.float()

    x, dy = (_numbers((5, 3, 16), seed, device, dtype) for seed in (9, 10))
    cos, sin = (_numbers((5, 1, 16), seed, device, dtype) for seed in (11, 12))
    y, dx = torch.empty_like(x), torch.empty_like(x)
    for given, backward, rotated in ((x, False, y), (dy, True, dx)):
        elementwise.rotate(given, 48, 16, cos.flatten(), sin.flatten(), 5, 3, 16, backward, rotated)
    expected = _differentiated(
        lambda x: x * cos.float() + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin.float(), [x], dy
    )
    yield from zip(("the rotation", "the gradient of the rotation"), (y, dx), expected, strict=True)


def _loss(device: torch.device, dtype: torch.dtype) -> Results:
    from lora_core.kernels.gpu import elementwise

    logits = 4 * _numbers((3, 5008), 13, device, dtype)
    labels, weights = torch.arange(3, device=device) * 2000, _numbers((3,), 14, device)
    losses, largest, sums, no_smoothing = (torch.empty(size, device=device) for size in (3, 3, 3, 0))
    correct, in_place = torch.empty(3, dtype=torch.bool, device=device), logits.clone()
    elementwise.score_logits(in_place, labels, no_smoothing, losses, correct, largest, sums)
    elementwise.logit_gradient(in_place, labels, weights, no_smoothing, largest, sums)
    expected = _differentiated(lambda logits: F.cross_entropy(logits, labels, reduction="none"), [logits], weights)
    yield from zip(("cross-entropy", "the gradient of cross-entropy"), (losses, in_place), expected, strict=True)


def _step(device: torch.device, dtype: torch.dtype) -> Results:
    from lora_core.kernels.gpu.optimizer import adamw, step_sizes

    rate, decay = 1e-2, 0.1
    p, g, m, v = (_numbers((16_384,), seed, device) for seed in (15, 16, 17, 18))
    v = v.square()
    copy = None if dtype == torch.float32 else torch.empty_like(p, dtype=dtype)
    yield "sizes of an AdamW step", step_sizes([(g, p, m)])[0], torch.stack([g.norm(), p.abs().max(), m.abs().max()])
    new_m, new_v = 0.9 * m + 0.1 * (g / 2), 0.99 * v + 0.01 * (g / 2).square()
    moved = (new_m / (1 - 0.9**3)) / ((new_v / (1 - 0.99**3)).sqrt() + EPSILON)
    expected = p * (1 - rate * decay) - rate * moved
    options = {"beta1": 0.9, "beta2": 0.99, "eps": EPSILON, "weight_decay": decay, "step": 3, "rate": rate}
    adamw([AdamwStep(p=p, g=g, m=m, v=v, compute=copy, clip=0.5, plus=slice(0, 0), plus_rate=rate, **options)])
    yield "a weight after an AdamW step", p if copy is None else copy, expected
    yield "a moment after an AdamW step", torch.cat([m, v]), torch.cat([new_m, new_v])


def _random_numbers(device: torch.device) -> Results:
    """Draw a dropout mask and uniform numbers, and find which of them have the bits of the host."""
    from lora_core.kernels.gpu.random_numbers import draw_mask, draw_within

    key, threshold, bounds = philox_key("comparison"), 58_982, np.array([0.5, 1e-3, 4096**-0.5, 70.0, 3**-0.5])
    flips = coin_flips("comparison", count=10_007, threshold=threshold).view(np.uint8)
    uniform = uniform_within("comparison", bounds=bounds, num_columns=1003)
    mask, within, bounds_M = upload([flips, uniform, bounds], device)
    drawn = draw_mask(key, threshold, mask), draw_within(key, bounds_M, 1003)
    for name, found, expected in zip(("a dropout mask", "a uniform number"), drawn, (mask, within), strict=True):
        yield name, found == expected, torch.ones_like(expected)


def _differentiated(reference: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Return what the reference computes in fp32, and the gradient of each input."""
    leaves = [part.float().clone().requires_grad_() for part in inputs]
    expected = reference(*leaves)
    return expected.detach(), *torch.autograd.grad(expected, leaves, gradient.float())


def _numbers(shape: Sequence[int], seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers between -1 and 1 that do not repeat."""
    places = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return torch.sin((places + seed) ** 1.5 * 0.7).view(*shape).to(device, dtype)

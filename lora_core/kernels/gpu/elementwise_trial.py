# pyright: basic
"""Trial of the elementwise, loss and optimizer kernels on a device, before they are used, against torch operations.

Shape suffixes: T tokens, D features, C labels, V classes.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels.gpu.optimizer_table import AdamwStep
from lora_core.kernels.gpu.trial_failures import failure_of, reason_of_others
from lora_core.kernels.gpu.trial_inputs import numbers

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest difference, as a fraction of the reference's largest number."""
T, C, V = 5, 3, 5008
D = 48
WIDE = 4096
"""Features of a row that several warps add up. Rows of D features have one."""
EAGER = "norms, gated activations, rotations, losses and optimizer steps run operation by operation"


_refused: dict[torch.device, str] = {}


def why_not_elementwise(device: torch.device) -> str | None:
    """Return why the kernels of elementwise.py and optimizer.py can't be used on this device, or None."""
    return _refused.get(device) or why_trial_failed(device)


def agree_on_elementwise(device: torch.device, gathered: Callable[[str | None], list[str | None]]) -> None:
    """Use the kernels only if their trial passed on every rank, because an optimizer step has other bits without them.

    `gathered` returns the value of every rank.
    """
    reason = reason_of_others(why_not_elementwise(device), gathered)
    if reason is not None:
        _refused[device] = reason


@cache
def why_trial_failed(device: torch.device) -> str | None:
    """Try the kernels on this device. Returns why they can't be used there, or None. Later calls read the result.

    Raises torch.AcceleratorError if the device can't be used any more.
    """
    return next(filter(None, (why_elementwise_differs(device, dtype) for dtype in TOLERANCE)), None)


@torch.enable_grad()  # the first call may come from a pass without gradients
def why_elementwise_differs(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return how the kernels differ from the reference on this device, or None if they agree."""
    try:
        for name, found, expected in elementwise_results(device, dtype):
            difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
            if not difference <= TOLERANCE[dtype]:
                return f"{EAGER}: {name} of the Triton kernels differs by {difference:.1e} of its largest number"
    except Exception as error:  # noqa: BLE001  (Triton's errors have no other base class)
        return f"{EAGER}: {failure_of(error, device)}"
    return None


def elementwise_results(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each result, what its kernel computes, and the reference."""
    yield from _of_swiglu(device, dtype)
    for features in (D, WIDE):
        yield from _of_norm(device, dtype, features)
    for rotated in (12, D // 3):
        yield from _of_rotation(device, dtype, rotated)
    yield from _of_loss(device, dtype)
    for count in (10_001, 16_384):
        yield from _of_step(device, dtype, count)


def _of_swiglu(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    from lora_core.kernels.gpu import elementwise

    gate, up, dy = (numbers((T * D,), seed, device).to(dtype) for seed in (1, 2, 3))
    y, dgate, dup = (torch.empty_like(gate) for _ in range(3))
    elementwise.swiglu(gate, up, y)
    elementwise.swiglu_backward(gate, up, dy, dgate, dup)
    wide = [_leaf(gate), _leaf(up)]
    expected = F.silu(wide[0]) * wide[1]
    expected.backward(dy.float())
    yield "silu(gate) · up", y, expected.detach()
    yield "the gradient of gate", dgate, _gradient(wide[0])
    yield "the gradient of up", dup, _gradient(wide[1])


def _of_norm(device: torch.device, dtype: torch.dtype, features: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Try the norm of a residual sum, and of the same numbers without a sum."""
    from lora_core.kernels.gpu import elementwise

    x, delta, dy, onward = (numbers((T, features), seed, device).to(dtype) for seed in (4, 5, 6, 7))
    weight = numbers((features,), 8, device).to(dtype)
    total, y, alone, again, dx, own_dx = (torch.empty_like(x) for _ in range(6))
    rate = torch.empty(T, device=device)
    elementwise.add_rms_norm(x, delta, weight, 1e-6, total, y, rate)
    elementwise.rms_norm_backward(total, rate, weight, dy, onward, dx)
    elementwise.rms_norm(total, weight, 1e-6, alone, rate)
    elementwise.rms_norm_with_rate(total, rate, weight, again)
    elementwise.rms_norm_backward(total, rate, weight, dy, onward[:0], own_dx)
    wide = _leaf(total)
    expected = F.rms_norm(wide, (features,), weight.float(), 1e-6)
    expected.backward(dy.float())
    yield f"the residual sum of {features} features", total, x.float() + delta.float()
    for what, made in (("with a residual sum", y), ("alone", alone), ("recomputed", again)):
        yield f"RMSNorm of {features} features {what}", made, expected.detach()
    gradient = _gradient(wide)
    yield f"the gradient of RMSNorm of {features} features", own_dx, gradient
    yield f"the gradient of RMSNorm of {features} features and of its sum", dx, gradient + onward.float()


def _of_rotation(device: torch.device, dtype: torch.dtype, rotated: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Try the rotation of the first `rotated` features of each head."""
    from lora_core.kernels.gpu import elementwise

    num_heads, size = 3, D // 3
    x = numbers((T, num_heads, size), 9, device).to(dtype)
    cos, sin = (numbers((T * rotated,), seed, device).to(dtype) for seed in (10, 11))
    for backward in (False, True):
        y = torch.empty_like(x)
        elementwise.rotate(x, D, size, cos, sin, T, num_heads, size, backward, y)
        low, high, rest = x.float().split([rotated // 2, rotated // 2, size - rotated], dim=-1)
        c_low, c_high = cos.float().view(T, 1, rotated).chunk(2, dim=-1)
        s_low, s_high = sin.float().view(T, 1, rotated).chunk(2, dim=-1)
        if backward:
            parts = low * c_low + high * s_high, high * c_high - low * s_low, rest
        else:
            parts = low * c_low - high * s_low, high * c_high + low * s_high, rest
        yield f"the rotation of {rotated} features, backward {backward},", y, torch.cat(parts, dim=-1)


def _of_loss(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    from lora_core.kernels.gpu import elementwise

    logits = 4 * numbers((C, V), 12, device).to(dtype)
    labels, weights = torch.arange(C, device=device) * 2000, numbers((C,), 13, device)
    for epsilon in (0.0, 0.1):
        smoothing = torch.full((C if epsilon else 0,), epsilon, device=device)
        losses, largest, sums = (torch.empty(C, device=device) for _ in range(3))
        correct = torch.empty(C, dtype=torch.bool, device=device)
        wide = _leaf(logits)
        expected = F.cross_entropy(wide, labels, reduction="none", label_smoothing=epsilon)
        expected.backward(weights)
        in_place = logits.clone()
        elementwise.score_logits(in_place, labels, smoothing, losses, correct, largest, sums)
        elementwise.logit_gradient(in_place, labels, weights, smoothing, largest, sums)
        yield "cross-entropy", losses, expected.detach()
        yield "the gradient of cross-entropy", in_place, _gradient(wide)


def _of_step(device: torch.device, dtype: torch.dtype, count: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Try an AdamW step of `count` numbers. Loads are of 16 bytes if that is a multiple of 16."""
    from lora_core.kernels.gpu.optimizer import adamw, step_sizes

    rate, decay, eps = 1e-2, 0.1, 1e-8
    p, g, m, v = (numbers((count,), seed, device) for seed in (14, 15, 16, 17))
    v = v.square()
    copy = None if dtype == torch.float32 else torch.empty(count, dtype=dtype, device=device)
    expected = torch.stack([g.norm(), p.abs().max(), m.abs().max()])
    yield f"sizes of a step of {count} numbers", step_sizes([(g, p, m)])[0], expected
    new_m, new_v = 0.9 * m + 0.1 * (g / 2), 0.99 * v + 0.01 * (g / 2).square()
    moved = (new_m / (1 - 0.9**3)) / ((new_v / (1 - 0.99**3)).sqrt() + eps)
    expected = p * (1 - rate * decay) - rate * moved
    options = {"beta1": 0.9, "beta2": 0.99, "eps": eps, "weight_decay": decay, "step": 3, "rate": rate}
    adamw([AdamwStep(p=p, g=g, m=m, v=v, compute=copy, clip=0.5, plus=slice(0, 0), plus_rate=rate, **options)])
    yield f"a weight after a step of {count} numbers", p if copy is None else copy, expected
    yield f"a moment after a step of {count} numbers", torch.cat([m, v]), torch.cat([new_m, new_v])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.float().clone().requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad

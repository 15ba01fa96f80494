# pyright: basic, reportIndexIssue=false, reportMissingImports=false
"""Gated activation, RMSNorm, rotary embedding and cross-entropy as Triton kernels, with the signatures of a CPU's.

lora_core/kernels/elementwise.py describes the functions. They round where a library rounds. A sum belongs to one row
and one program, so a row's bits don't depend on the number of rows. Shape suffixes: T tokens, D features, H heads, E
features of a head, B classes of a block.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a program of the gated activation, and of the gradient of logits."""
SCORED_BLOCK = 4096
"""Logits that a program scores at a time."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def swiglu(gate: Tensor, up: Tensor, y: Tensor) -> None:
    _swiglu[-(-gate.numel() // BLOCK),](gate, up, y, gate.numel(), BLOCK=BLOCK, **OPTIONS)


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor, dgate: Tensor, dup: Tensor) -> None:
    grid = (-(-gate.numel() // BLOCK),)
    _swiglu_backward[grid](gate, up, dy, dgate, dup, gate.numel(), BLOCK=BLOCK, **OPTIONS)


def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor, rate: Tensor) -> None:
    _rms_norm[len(x),](x, x, weight, x, y, rate, x.shape[1], eps, HAS_DELTA=False, **_of_rows(x.shape[1]))


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, total: Tensor, y: Tensor, rate: Tensor) -> None:
    _rms_norm[len(x),](x, delta, weight, total, y, rate, x.shape[1], eps, HAS_DELTA=True, **_of_rows(x.shape[1]))


def rms_norm_with_rate(x: Tensor, rate: Tensor, weight: Tensor, y: Tensor) -> None:
    """y = w · round(x · rate), the bits of both forwards: it has no sum, whose order their variants could change."""
    _rms_norm_with_rate[len(x),](x, rate, weight, y, x.shape[1], **_of_rows(x.shape[1]))


def rms_norm_backward(x: Tensor, rate: Tensor, weight: Tensor, dy: Tensor, onward: Tensor, dx: Tensor) -> None:
    added = {"HAS_ONWARD": onward.numel() > 0}
    _rms_norm_backward[len(x),](x, rate, weight, dy, onward, dx, x.shape[1], **added, **_of_rows(x.shape[1]))


def rotate(
    source: Tensor,
    token_stride: int,
    head_stride: int,
    cos: Tensor,
    sin: Tensor,
    num_tokens: int,
    num_heads: int,
    size: int,
    backward: bool,
    target: Tensor,
) -> None:
    rotated = cos.numel() // num_tokens
    constants = {"H": 1 << (num_heads - 1).bit_length(), "HALF": 1 << (rotated // 2 - 1).bit_length()}
    rest = 0 if rotated == size else 1 << (size - rotated - 1).bit_length()
    _rotate[num_tokens,](
        source, token_stride, head_stride, cos, sin, num_heads, size, rotated, target,
        BACKWARD=backward, REST=rest, **constants, **OPTIONS,
    )  # fmt: skip


def score_logits(
    logits: Tensor,
    labels: Tensor,
    smoothing: Tensor,
    losses: Tensor,
    correct: Tensor,
    largest: Tensor,
    sums: Tensor,
) -> None:
    _score_logits[len(logits),](
        logits, labels, smoothing, losses, correct, largest, sums, logits.shape[1],
        SMOOTHED=smoothing.numel() > 0, BLOCK=SCORED_BLOCK, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def logit_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, smoothing: Tensor, largest: Tensor, sums: Tensor
) -> None:
    _logit_gradient[len(logits), -(-logits.shape[1] // BLOCK)](
        logits, labels, weights, smoothing, largest, sums, logits.shape[1],
        SMOOTHED=smoothing.numel() > 0, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip


def _of_rows(num_features: int) -> dict[str, int | bool]:
    width = 1 << (num_features - 1).bit_length()
    return {"WIDTH": width, "num_warps": min(max(width // 512, 1), 16), "enable_fp_fusion": True}


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _swiglu(gate, up, y, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    g = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    silu = (g * _sigmoid(g)).to(y.dtype.element_ty).to(tl.float32)
    product = silu * tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + places, product.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate, up, dy, dgate, dup, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    g = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + places, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(g)
    silu = (g * sigmoid).to(dup.dtype.element_ty).to(tl.float32)
    dsilu = (d * u).to(dup.dtype.element_ty).to(tl.float32)
    tl.store(dup + places, (d * silu).to(dup.dtype.element_ty), mask=inside)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + places, (dsilu * slope).to(dgate.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm(x, delta, weight, total, y, rate, width, eps, HAS_DELTA: tl.constexpr, WIDTH: tl.constexpr):
    features = tl.arange(0, WIDTH)
    inside = features < width
    row = tl.program_id(0).to(tl.int64) * width
    x_D = tl.load(x + row + features, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta_D = tl.load(delta + row + features, mask=inside, other=0.0).to(tl.float32)
        rounded_D = (x_D + delta_D).to(total.dtype.element_ty)
        tl.store(total + row + features, rounded_D, mask=inside)
        x_D = rounded_D.to(tl.float32)
    rate_of_row = 1.0 / tl.sqrt_rn(tl.sum(x_D * x_D) / width + eps)
    tl.store(rate + tl.program_id(0), rate_of_row)
    normed_D = (x_D * rate_of_row).to(y.dtype.element_ty).to(tl.float32)
    weight_D = tl.load(weight + features, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + features, (weight_D * normed_D).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_with_rate(x, rate, weight, y, width, WIDTH: tl.constexpr):
    features = tl.arange(0, WIDTH)
    inside = features < width
    row = tl.program_id(0).to(tl.int64) * width
    x_D = tl.load(x + row + features, mask=inside, other=0.0).to(tl.float32)
    normed_D = (x_D * tl.load(rate + tl.program_id(0))).to(y.dtype.element_ty).to(tl.float32)
    weight_D = tl.load(weight + features, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + features, (weight_D * normed_D).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(x, rate, weight, dy, onward, dx, width, HAS_ONWARD: tl.constexpr, WIDTH: tl.constexpr):
    features = tl.arange(0, WIDTH)
    inside = features < width
    row = tl.program_id(0).to(tl.int64) * width
    rate_of_row = tl.load(rate + tl.program_id(0))
    weight_D = tl.load(weight + features, mask=inside, other=0.0).to(tl.float32)
    dy_D = tl.load(dy + row + features, mask=inside, other=0.0).to(tl.float32)
    g_D = (dy_D * weight_D).to(dy.dtype.element_ty).to(tl.float32)
    normed_D = tl.load(x + row + features, mask=inside, other=0.0).to(tl.float32) * rate_of_row
    mean = tl.sum(g_D * normed_D) / width
    dx_D = (rate_of_row * (g_D - normed_D * mean)).to(dx.dtype.element_ty)
    if HAS_ONWARD:
        onward_D = tl.load(onward + row + features, mask=inside, other=0.0).to(tl.float32)
        dx_D = (onward_D + dx_D.to(tl.float32)).to(dx.dtype.element_ty)
    tl.store(dx + row + features, dx_D, mask=inside)


@triton.jit
def _rotate(
    source, token_stride, head_stride, cos, sin, num_heads, size, rotated, target,
    BACKWARD: tl.constexpr, REST: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads, pairs, half = tl.arange(0, H), tl.arange(0, HALF), rotated // 2
    inside_HE = (heads < num_heads)[:, None] & (pairs < half)[None, :]
    from_HE = source + token * token_stride + heads[:, None] * head_stride + pairs[None, :]
    into_HE = target + token * num_heads * size + heads[:, None] * size + pairs[None, :]
    low_HE = tl.load(from_HE, mask=inside_HE, other=0.0).to(tl.float32)
    high_HE = tl.load(from_HE + half, mask=inside_HE, other=0.0).to(tl.float32)
    angles = token * rotated + pairs
    cos_low = tl.load(cos + angles, mask=pairs < half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + angles + half, mask=pairs < half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + angles, mask=pairs < half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + angles + half, mask=pairs < half, other=0.0).to(tl.float32)[None, :]
    dtype = target.dtype.element_ty
    if BACKWARD:
        new_low_HE = low_HE * cos_low + high_HE * sin_high
        new_high_HE = high_HE * cos_high - low_HE * sin_low
    else:
        new_low_HE = (low_HE * cos_low).to(dtype).to(tl.float32) - (high_HE * sin_low).to(dtype).to(tl.float32)
        new_high_HE = (high_HE * cos_high).to(dtype).to(tl.float32) + (low_HE * sin_high).to(dtype).to(tl.float32)
    tl.store(into_HE, new_low_HE.to(dtype), mask=inside_HE)
    tl.store(into_HE + half, new_high_HE.to(dtype), mask=inside_HE)
    if REST > 0:
        others = tl.arange(0, REST)
        inside_HR = (heads < num_heads)[:, None] & (others < size - rotated)[None, :]
        from_HR = source + token * token_stride + heads[:, None] * head_stride + (rotated + others)[None, :]
        into_HR = target + token * num_heads * size + heads[:, None] * size + (rotated + others)[None, :]
        tl.store(into_HR, tl.load(from_HR, mask=inside_HR, other=0.0), mask=inside_HR)


@triton.jit
def _score_logits(
    logits, labels, smoothing, losses, correct, largest, sums, num_classes,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    label_index = tl.program_id(0)
    row = logits + label_index.to(tl.int64) * num_classes
    most, total, whole = -float("inf"), 0.0, 0.0
    for start in range(0, num_classes, BLOCK):
        inside = start + tl.arange(0, BLOCK) < num_classes
        z_B = tl.load(row + start + tl.arange(0, BLOCK), mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(z_B))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(z_B - higher))
        most = higher
        if SMOOTHED:
            whole += tl.sum(tl.where(inside, z_B, 0.0))
    own = tl.load(row + tl.load(labels + label_index)).to(tl.float32)
    tl.store(largest + label_index, most)
    tl.store(sums + label_index, total)
    tl.store(correct + label_index, own >= most)
    if SMOOTHED:
        epsilon = tl.load(smoothing + label_index)
        own = tl.where(epsilon > 0, (1.0 - epsilon) * own + epsilon * (whole / num_classes), own)
    tl.store(losses + label_index, tl.log(total) + most - own)


@triton.jit
def _logit_gradient(
    logits, labels, weights, smoothing, largest, sums, num_classes,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    label_index = tl.program_id(0)
    row = logits + label_index.to(tl.int64) * num_classes
    classes_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = classes_B < num_classes
    weight = tl.load(weights + label_index)
    of_label, spread = weight, 0.0
    if SMOOTHED:
        epsilon = tl.load(smoothing + label_index)
        of_label, spread = weight * (1.0 - epsilon), weight * epsilon / num_classes
    z_B = tl.load(row + classes_B, mask=inside, other=0.0).to(tl.float32)
    factor = weight / tl.load(sums + label_index)
    slope_B = tl.exp(z_B - tl.load(largest + label_index)) * factor - spread
    slope_B = tl.where(classes_B == tl.load(labels + label_index), slope_B - of_label, slope_B)
    tl.store(row + classes_B, slope_B.to(logits.dtype.element_ty), mask=inside)

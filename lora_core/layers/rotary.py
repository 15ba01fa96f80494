# pyright: basic
"""Rotary position embedding in one memory pass forward and backward, where a library needs a dozen.

On a CPU a compiled kernel rotates, and on a GPU one that torch compiles.

An attention module finds `apply_rotary_pos_emb` in the globals of its file, which all models of the family in this
process share and which are therefore not modified. Instead, an instance gets its class's own `forward` over a copy of
the globals, in which this one name is replaced. The replacement is only used if a test gives the same numbers as the
family's function. Shape suffixes: H heads, T tokens, E features of a head, D rotated features.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import ANY_FAILURE
from lora_core.kernels.elementwise import rotate
from lora_core.kernels.numba_jit import array_of, flat_memory, runs_on
from lora_core.packing.packed_batch import current_pack

NAME = "apply_rotary_pos_emb"
CHECKED_TOKENS, CHECKED_FEATURES, CHECKED_PART = 5, 16, 6

Rotation = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryCall:
    """A family's function, the node that replaces it, and whether that gives the same numbers for heads rotated
    completely or in part."""

    original: Rotation
    node: type[torch.autograd.Function]
    whole: bool
    part: bool


def faster_rotations(
    model: nn.Module, node: type[torch.autograd.Function] | None = None
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return the attention modules of `model` whose rotation can be replaced, each with its new forward.

    `node` rotates. By default it is that of a CPU, and nothing is replaced elsewhere.
    """
    found = [(module, own) for module in model.modules() if (own := _own_forward(module)) is not None]
    rotary_calls: dict[tuple[Rotation, torch.dtype], RotaryCall] = {}
    forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
    for module, own in found:
        original, like = own.__globals__[NAME], next(module.parameters())
        if (original, like.dtype) not in rotary_calls:
            rotary_calls[original, like.dtype] = _check(original, node or Rotate, like)
        answer = rotary_calls[original, like.dtype]
        if answer.whole or answer.part:
            forwards.append((module, partial(_forward, module, _with_rotation(own, answer))))
    return forwards


def _own_forward(module: nn.Module) -> FunctionType | None:
    """Return the class's forward without decorators, if it calls the function `apply_rotary_pos_emb`."""
    own = inspect.unwrap(type(module).forward)
    if not isinstance(own, FunctionType) or NAME not in own.__code__.co_names:
        return None
    return own if callable(own.__globals__.get(NAME)) and any(True for _ in module.parameters()) else None


def _with_rotation(own: FunctionType, rotary_call: RotaryCall) -> FunctionType:
    names = own.__globals__ | {NAME: partial(_rotated, rotary_call)}
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return copy


def _forward(module: nn.Module, own: FunctionType, *args: Any, **kwargs: Any) -> Any:
    if current_pack() is None:
        return type(module).forward(module, *args, **kwargs)
    return own(module, *args, **kwargs)


def _check(original: Rotation, node: type[torch.autograd.Function], like: Tensor) -> RotaryCall:
    is_able = node is not Rotate or runs_on(like)
    whole, part = (is_able and _agrees(original, node, like, size) for size in (CHECKED_FEATURES, CHECKED_PART))
    return RotaryCall(original=original, node=node, whole=whole, part=part)


@torch.no_grad()
def _agrees(original: Rotation, node: type[torch.autograd.Function], like: Tensor, num_rotated: int) -> bool:
    """Return whether both functions rotate `num_rotated` features by the same numbers, up to the last bit or two.

    The test uses two query heads and one key head.
    """
    numbers = torch.arange(5 * CHECKED_TOKENS * CHECKED_FEATURES, dtype=torch.float32, device=like.device)
    rows = torch.sin(numbers * 0.7).to(like.dtype).view(5, CHECKED_TOKENS, CHECKED_FEATURES)
    query, key = rows[:2][None], rows[2:3][None]
    cos, sin = (row[..., :num_rotated].contiguous() for row in (rows[3:4], rows[4:]))
    try:
        expected = original(query, key, cos, sin)
    except ANY_FAILURE:
        return False  # a function with other parameters
    ours = node.apply(query, key, cos, sin)
    bound = 2 * torch.finfo(like.dtype).eps
    return all(
        reference.shape == actual.shape and torch.allclose(actual.float(), reference.float(), rtol=bound, atol=bound)
        for actual, reference in zip(ours, expected, strict=True)
    )


def _rotated(
    rotary_call: RotaryCall, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    agrees = rotary_call.whole if cos.shape[-1] == query.shape[-1] else rotary_call.part
    if not agrees or args or kwargs.get("unsqueeze_dim", 1) != 1 or not _fits(query, key, cos, sin):
        return rotary_call.original(query, key, cos, sin, *args, **kwargs)
    if rotary_call.node is Rotate and not all(map(runs_on, (query, key, cos, sin))):
        return rotary_call.original(query, key, cos, sin)
    return rotary_call.node.apply(query, key, cos, sin)  # pyright: ignore[reportReturnType]


def _fits(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether there is one row of tokens, in one dtype, with an even number of rotated features."""
    num_tokens, size = query.shape[-2:]
    return (
        all(tensor.dtype == query.dtype for tensor in (query, key, cos, sin))
        and (query.ndim, key.ndim, len(query), key.shape[-2:]) == (4, 4, 1, query.shape[-2:])
        and cos.shape == sin.shape == (1, num_tokens, cos.shape[-1])
        and cos.shape[-1] <= size
        and cos.shape[-1] % 2 == 0
    )


class Rotate(torch.autograd.Function):
    """Rotates query [1, H, T, E] and key [1, K, T, E] by cos and sin [1, T, D], which get no gradient.

    The outputs are stored token by token.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor):
        ctx.angles = array_of(cos.reshape(-1)), array_of(sin.reshape(-1))
        return _rotate_by(query, ctx.angles, backward=False), _rotate_by(key, ctx.angles, backward=False)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        query, key = grad_outputs
        return _rotate_by(query, ctx.angles, backward=True), _rotate_by(key, ctx.angles, backward=True), None, None


def _rotate_by(heads: Tensor, angles: tuple[Any, Any], *, backward: bool) -> Tensor:
    plain_HTE, numbers = flat_memory(heads.squeeze(0))
    num_heads, num_tokens, size = plain_HTE.shape
    head_stride, token_stride, _ = plain_HTE.stride()
    target_THE = heads.new_empty(num_tokens, num_heads, size)
    into = array_of(target_THE.view(-1))
    rotate(numbers, token_stride, head_stride, *angles, num_tokens, num_heads, size, backward, into)
    return target_THE.transpose(0, 1)[None]

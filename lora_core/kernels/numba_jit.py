# pyright: basic
"""What loops over rows that Numba compiles for a CPU are made of: one pass through memory where torch takes several.

Arrays are float32, or uint16 that holds the bits of bfloat16; arithmetic is in fp32. A kernel computes each row by
itself from start to end, so neither the number of rows nor the lane can be seen in its bits. Compiled code is kept
between processes, beside the source or in the user's cache.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

BLOCK = 512
"""Elements that are added up in fp32; sums of blocks are added in fp64."""


def compiled(function: Function) -> Function:
    """Without the GIL, for lanes; sums may be reordered within a block, numbers that are not finite stay so."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
    kernel: Any = njit(**options)(function)
    with suppress(RuntimeError):  # no folder can be written to: compiled anew in each process
        kernel._cache = KernelCache(function)
    return cast(Function, kernel)


def inlined(function: Function) -> Function:
    """What kernels are made of, as part of each of them.

    A function that is called instead is kept with its kernel and compiled by itself besides; the linker takes the one
    that a process met first, and a kernel just compiled would sum in another order than the same one out of the cache.
    """
    return cast(Function, register_jitable(forceinline=True)(function))


def array_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, as the kernels take it."""
    assert tensor.is_contiguous(), "kernels read memory in its order"
    plain = tensor.detach()
    return plain.view(torch.uint16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()


def flat_memory(x: Tensor) -> tuple[Tensor, np.ndarray]:
    """`x`, or a copy where its last dimension is scattered, and its memory from its first element to its last, flat."""
    plain = x if x.stride(-1) == 1 else x.contiguous()
    span = 1 + sum((size - 1) * stride for size, stride in zip(plain.shape, plain.stride(), strict=True))
    return plain, array_of(plain.as_strided((span,), (1,)))


def runs_on(tensor: Tensor) -> bool:
    """Whether the kernels can take it."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float32)


@intrinsic
def _as_float(_context: Any, _bits: Any = None) -> Any:
    """float32 of the same bits as a uint32."""
    return types.float32(types.uint32), lambda _c, builder, _s, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def _rounded(_context: Any, _number: Any = None) -> Any:
    """uint16 of bfloat16: in 32 bits all through, where Numba's own integers are of 64 and vectors half as long."""

    def generate(_c: Any, builder: Any, _s: Any, values: Any) -> Any:
        word, half = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(values[0], word)
        last = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(builder.add(bits, word(0x7FFF)), last), word(16))
        is_nan = builder.fcmp_unordered("uno", values[0], values[0])
        return builder.trunc(builder.select(is_nan, word(0x7FC0), rounded), half)

    return types.uint16(types.float32), generate


@intrinsic
def in_order(_context: Any, _number: Any = None) -> Any:
    """An int32 that compares as the float32 does, NaN as an extreme: the largest of integers is found in vectors."""
    return types.int32(types.float32), lambda _c, builder, _s, values: _flipped(
        builder, builder.bitcast(values[0], ir.IntType(32))
    )


@intrinsic
def of_order(_context: Any, _order: Any = None) -> Any:
    """The float32 of such an int32."""
    return types.float32(types.int32), lambda _c, builder, _s, values: builder.bitcast(
        _flipped(builder, values[0]), ir.FloatType()
    )


def _flipped(builder: Any, bits: Any) -> Any:
    """All bits but the sign's turned where it is set: the order of negative numbers is that of their bits reversed."""
    word = ir.IntType(32)
    return builder.xor(bits, builder.and_(builder.ashr(bits, word(31)), word(0x7FFFFFFF)))


def widened(stored):
    """fp32 of an element, in compiled code."""
    raise AssertionError("for compiled code")


def narrowed(number, like):
    """fp32 to what an array like `_like` holds, to nearest, ties to even; in compiled code."""
    raise AssertionError("for compiled code")


@overload(widened, jit_options={"forceinline": True})
def _widened(stored):
    if stored == types.uint16:
        return lambda stored: _as_float(np.uint32(stored) << np.uint32(16))
    return lambda stored: stored


@overload(narrowed, jit_options={"forceinline": True})
def _narrowed(number, like):
    if like.dtype == types.uint16:
        return lambda number, like: _rounded(np.float32(number))
    return lambda number, like: np.float32(number)


@inlined
def copied(source: Any, start: Any, target: Any, first: Any, count: Any) -> None:
    """`count` elements of a flat array from `start` on to those of another from `first` on."""
    for e in range(count):
        target[first + e] = source[start + e]


@inlined
def exponential(x: Any) -> Any:
    """e^x in fp32 to five units in the last place (Cephes' expf): 0 below the smallest normal number, infinite
    from 88.38 on."""
    bounded = min(max(x, np.float32(-87.33)), np.float32(88.72))
    n = np.floor(bounded * np.float32(1.44269504088896341) + np.float32(0.5))
    r = bounded - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    power = p * _as_float(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    power = np.float32(0) if x < np.float32(-87.33) else power
    return x if np.isnan(x) else power


@inlined
def hyperbolic_tangent(x: Any) -> Any:
    """tanh x in fp32 to four units in the last place: Eigen's quotient of two polynomials."""
    bounded = min(max(x, np.float32(-7.90531110763549805)), np.float32(7.90531110763549805))
    square = bounded * bounded
    p = np.float32(-2.76076847742355e-16)
    p = p * square + np.float32(2.00018790482477e-13)
    p = p * square + np.float32(-8.60467152213735e-11)
    p = p * square + np.float32(5.12229709037114e-08)
    p = p * square + np.float32(1.48572235717979e-05)
    p = p * square + np.float32(6.37261928875436e-04)
    p = p * square + np.float32(4.89352455891786e-03)
    q = np.float32(1.19825839466702e-06)
    q = q * square + np.float32(1.18534705686654e-04)
    q = q * square + np.float32(2.26843463243900e-03)
    q = q * square + np.float32(4.89352518554385e-03)
    return x if np.isnan(x) else bounded * p / q


@cache
def shared_digest() -> str:
    """Of all sources that kernels are made of."""
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


class KernelCache(FunctionCache):
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), shared_digest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(OSError):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)

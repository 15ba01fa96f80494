# pyright: basic
"""Building blocks of the CPU kernels that Numba compiles, which pass through memory once where torch does repeatedly.

Arrays are float32, or uint16 with the bits of bfloat16. Arithmetic is fp32. A kernel computes each row separately from
start to end, so its bits depend neither on the number of rows nor on the lane. Compiled code is cached between
processes, next to the source or in the user's cache folder.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor


def _as_written(*_given: Any, **_options: Any) -> Callable[[Any], Any]:
    """Stand in for a decorator of Numba, and leave the function as it is."""
    return lambda function: function


REFUSAL: str | None = None
"""Why Numba can't be imported, for example because NumPy is too new for it. A GPU needs none of these kernels."""
try:
    from llvmlite import ir
    from numba import njit, types
    from numba.core.caching import FunctionCache
    from numba.extending import intrinsic, overload, register_jitable
except Exception as error:  # noqa: BLE001  (versions that don't fit together raise errors of many types)
    REFUSAL = f"{type(error).__name__}: {str(error).removesuffix('.')}"
    ir = types = cast(Any, None)
    FunctionCache = cast(Any, object)
    njit = intrinsic = overload = register_jitable = cast(Any, _as_written)

Function = TypeVar("Function", bound=Callable[..., Any])

BLOCK = 512
"""Elements that are summed in fp32. Sums of blocks are added in fp64."""


def compiled(function: Function, *, in_order: bool = False) -> Function:
    """Compile without the GIL, for lanes. Sums may be reordered within a block, unless `in_order`. NaN and infinity are
    preserved."""
    if REFUSAL is not None:
        return function  # `runs_on` is false everywhere
    fast = False if in_order else {"contract", "reassoc", "nsz"}
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fast}
    kernel: Any = njit(**options)(function)
    with suppress(RuntimeError):  # no writable cache folder: every process compiles the kernel
        kernel._cache = KernelCache(function)
    return cast(Function, kernel)


def inlined(function: Function) -> Function:
    """Make a function inlinable into kernels.

    A called function would be cached with its kernel and also compiled on its own, and the linker takes the one that
    a process loaded first. A freshly compiled kernel could then sum in a different order than the cached one.
    """
    return cast(Function, register_jitable(forceinline=True)(function))


def array_of(tensor: Tensor) -> np.ndarray:
    """Return the memory of a contiguous CPU tensor as the kernels expect it (bfloat16 as uint16)."""
    assert tensor.is_contiguous(), "kernels need contiguous memory"
    plain = tensor.detach()
    return plain.view(torch.uint16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()


def flat_memory(x: Tensor) -> tuple[Tensor, np.ndarray]:
    """Return `x`, copied if its last dimension isn't contiguous, and its memory from first to last element, flat."""
    plain = x if x.stride(-1) == 1 else x.contiguous()
    span = 1 + sum((size - 1) * stride for size, stride in zip(plain.shape, plain.stride(), strict=True))
    return plain, array_of(plain.as_strided((span,), (1,)))


def runs_on(tensor: Tensor) -> bool:
    """Return whether the kernels support the tensor's device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float32) and REFUSAL is None


@intrinsic
def _as_float(_context: Any, _bits: Any = None) -> Any:
    """Bit cast from uint32 to float32."""
    return types.float32(types.uint32), lambda _c, builder, _s, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def _rounded(_context: Any, _number: Any = None) -> Any:
    """Round fp32 to the bits of bfloat16, with 32-bit integers: Numba's 64-bit ones would halve the vectors."""

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
    """Map float32 to int32 with the same order, NaN as an extreme, because a maximum of integers is vectorized."""
    return types.int32(types.float32), lambda _c, builder, _s, values: _flipped(
        builder, builder.bitcast(values[0], ir.IntType(32))
    )


@intrinsic
def of_order(_context: Any, _order: Any = None) -> Any:
    """Inverse of `in_order`."""
    return types.float32(types.int32), lambda _c, builder, _s, values: builder.bitcast(
        _flipped(builder, values[0]), ir.FloatType()
    )


def _flipped(builder: Any, bits: Any) -> Any:
    """Flip all bits except the sign of negative numbers, whose bits have the reverse order of their values."""
    word = ir.IntType(32)
    return builder.xor(bits, builder.and_(builder.ashr(bits, word(31)), word(0x7FFFFFFF)))


def widened(stored):
    """Convert an element to fp32, in compiled code."""
    raise AssertionError("for compiled code")


def narrowed(number, like):
    """Round fp32 to the element type of the array `like` (to nearest, ties to even), in compiled code."""
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
    """Copy `count` elements of a flat array, from index `start`, to another one from index `first`."""
    for e in range(count):
        target[first + e] = source[start + e]


@inlined
def exponential(x: Any) -> Any:
    """Return e^x in fp32 with an error of at most five units in the last place (expf of Cephes).

    It is 0 below the smallest normal number and infinite from 88.38 on.
    """
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
    """Return tanh x in fp32 with an error of at most four units in the last place (Eigen's rational approximation)."""
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
    """Return the digest of all kernel sources. It invalidates caches when a shared building block changes."""
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


class KernelCache(FunctionCache):  # pyright: ignore[reportGeneralTypeIssues]  (without Numba it is `object`)
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), shared_digest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(OSError):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)

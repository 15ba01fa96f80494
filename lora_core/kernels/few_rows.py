# pyright: basic
"""A compiled matmul of at most 8 rows that sums in the order of torch's matmul of a block: y = x Wᵀ + b in fp32.

Reading W takes most of the time of such a matmul. A block of 256 rows takes ten times as long (batch_invariant.py). The
kernel reads W once, and adds as MKL's kernels do: fused multiply-adds in the order of K, in R runs whose sums are added
to b. Letters: T rows, K summed, N columns.
"""

from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from lora_core.kernels.numba_jit import compiled, intrinsic, ir, types

MAX_ROWS = 8
COLUMNS = 8
"""Columns that are computed together. Each needs a register of MAX_ROWS sums, and AVX2 has 16 registers."""
UNROLLED = 16
"""Summands between two prefetches. 16 weights fill a cache line."""


def multiply(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, y_TN: Tensor, run_ends: Tensor) -> None:
    """Write x Wᵀ + b to y. T is at most MAX_ROWS, N at least COLUMNS, and W and y are contiguous.

    `run_ends` [R] are the numbers of summands before the end of each run, in int64. The last is K.
    """
    x_TK = x_TK.contiguous()
    bias = 0 if bias_N is None else bias_N.data_ptr()
    addresses = (x_TK.data_ptr(), weight_NK.data_ptr(), bias, y_TN.data_ptr())
    _multiply(addresses, (*x_TK.shape, len(weight_NK)), run_ends.numpy())


@intrinsic
def _add_run(_context: Any, sums: Any = None, x: Any = None, weight: Any = None, stride: Any = None, count: Any = None):
    """sums[n, t] += Σ x[k, t] weight[n, k] over k < count, for COLUMNS rows of `weight`, `stride` elements apart.

    `sums`, `x` and `weight` are addresses. The sum starts at 0, and is added to `sums` at its end.
    """
    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), _generate_run


def _generate_run(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
    word, short, number = ir.IntType(64), ir.IntType(32), ir.FloatType()
    vector, byte_pointer = ir.VectorType(number, MAX_ROWS), ir.IntType(8).as_pointer()
    module = builder.module
    fused = module.declare_intrinsic(f"llvm.fma.v{MAX_ROWS}f32", fnty=ir.FunctionType(vector, [vector] * 3))
    prefetch = module.declare_intrinsic(
        "llvm.prefetch", [byte_pointer], fnty=ir.FunctionType(ir.VoidType(), [byte_pointer, short, short, short])
    )
    sums_at, x_at, weight_at = (builder.inttoptr(value, number.as_pointer()) for value in values[:3])
    stride, count = values[3:]
    rows = [builder.gep(weight_at, [builder.mul(stride, word(column))]) for column in range(COLUMNS)]
    nothing, all_first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(short, MAX_ROWS), [0] * MAX_ROWS)

    def added(sums: Any, k: Any) -> Any:
        x = builder.load(_as_vector(builder, builder.gep(x_at, [builder.mul(k, word(MAX_ROWS))]), vector), align=4)
        for row, total in zip(rows, sums, strict=True):
            first = builder.insert_element(nothing, builder.load(builder.gep(row, [k])), short(0))
            yield builder.call(fused, [builder.shuffle_vector(first, nothing, all_first), x, total])

    def looped(sums: Any, first: Any, last: Any, step: int) -> Any:
        """Add the summands from `first` to `last`, `step` at a time."""
        before = builder.block
        head, body, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(word)
        k.add_incoming(first, before)
        totals = [builder.phi(vector) for _ in sums]
        for total, start in zip(totals, sums, strict=True):
            total.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", k, last), body, after)
        builder.position_at_end(body)
        if step == UNROLLED:  # fetch the same place of the next columns
            ahead = builder.add(k, builder.mul(stride, word(COLUMNS)))
            for row in rows:
                place = builder.bitcast(builder.gep(row, [ahead]), byte_pointer)
                builder.call(prefetch, [place, short(0), short(2), short(1)])
        found = totals
        for offset in range(step):
            found = list(added(found, builder.add(k, word(offset))))
        k.add_incoming(builder.add(k, word(step)), builder.block)
        for total, new in zip(totals, found, strict=True):
            total.add_incoming(new, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return totals

    whole = builder.sub(count, builder.srem(count, word(UNROLLED)))
    sums = looped([ir.Constant(vector, [0.0] * MAX_ROWS)] * COLUMNS, word(0), whole, UNROLLED)
    for column, total in enumerate(looped(sums, whole, count, 1)):
        place = _as_vector(builder, builder.gep(sums_at, [word(column * MAX_ROWS)]), vector)
        builder.store(builder.fadd(builder.load(place, align=4), total), place, align=4)
    return context.get_dummy_value()


def _as_vector(builder: Any, pointer: Any, vector: Any) -> Any:
    return builder.bitcast(pointer, vector.as_pointer())


@intrinsic
def _numbers_at(_context: Any, _address: Any = None) -> Any:
    """Return a pointer to float32."""
    pointer = types.CPointer(types.float32)
    return pointer(types.intp), lambda context, builder, signature, values: builder.inttoptr(
        values[0], context.get_value_type(signature.return_type)
    )


@partial(compiled, in_order=True)
def _multiply(addresses, shape, run_ends):
    """`addresses` are those of x, W, b (0 if there is none) and y, `shape` is (T, K, N)."""
    num_rows, num_summed, num_columns = shape
    x, bias, y = _numbers_at(addresses[0]), _numbers_at(addresses[2]), _numbers_at(addresses[3])
    by_summand = np.zeros((num_summed, MAX_ROWS), np.float32)
    for row in range(num_rows):
        for k in range(num_summed):
            by_summand[k, row] = x[row * num_summed + k]
    sums = np.empty((COLUMNS, MAX_ROWS), np.float32)
    for group in range(-(-num_columns // COLUMNS)):
        first = min(group * COLUMNS, num_columns - COLUMNS)  # the last columns may be computed twice
        for column in range(COLUMNS):
            sums[column] = bias[first + column] if addresses[2] else np.float32(0)
        start = 0
        for end in run_ends:
            _add_run(
                sums.ctypes.data,
                by_summand.ctypes.data + start * MAX_ROWS * 4,
                addresses[1] + (first * num_summed + start) * 4,
                num_summed,
                end - start,
            )
            start = end
        for column in range(COLUMNS):
            for row in range(num_rows):
                y[row * num_columns + first + column] = sums[column, row]

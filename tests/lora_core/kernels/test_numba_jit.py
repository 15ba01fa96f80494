"""A compiled kernel is one piece of code, identical whether a process compiled it or found it in the cache."""

import re
from typing import Any

import numba
import numpy as np
import pytest
from numba.core.caching import NullCache

from lora_core.kernels import attention, elementwise
from lora_core.kernels.numba_jit import compiled

STORED = {"float32": np.float32, "bfloat16": np.uint16}
FLOATS = np.ones(32, np.float32)


def kernels() -> dict[str, Any]:
    modules = (attention, elementwise, elementwise, elementwise, elementwise)
    return {name: member for module in modules for name, member in vars(module).items() if hasattr(member, "py_func")}


def arguments(stored: type) -> dict[str, tuple[Any, ...]]:
    """Return arguments with the types that each kernel is called with."""
    row, rows, place, none = np.ones(32, stored), np.ones((2, 16), stored), (0, 0, 2), np.ones(0, np.float32)
    return {
        "visible_softmax": (row, row, 2, 16, 1, place, 0.5, 0.0, True, 2),
        "score_gradient": (row, row, row, 2, 16, 1, place, 0.5, 0.0, True, 2),
        "to_heads": (row, 0, 16, 16, 2, 2, 1, 16, row),
        "from_heads": (row, 2, 1, 16, row),
        "swiglu": (row, row, row),
        "swiglu_backward": (row, row, row, row, row),
        "score_logits": (rows, np.zeros(2, np.int64), none, FLOATS, np.zeros(2, np.bool_), FLOATS, FLOATS),
        "logit_gradient": (rows, np.zeros(2, np.int64), FLOATS, none, FLOATS, FLOATS),
        "rms_norm": (rows, row, 1e-6, rows, FLOATS),
        "add_rms_norm": (rows, rows, row, 1e-6, rows, rows, FLOATS),
        "rms_norm_backward": (rows, FLOATS, row, rows, rows, rows),
        "rotate": (row, 16, 16, row, row, 2, 1, 16, False, row),
    }


def functions_apart(kernel: Any, given: tuple[Any, ...]) -> list[str]:
    """Return the functions that a kernel compiles to, apart from itself and its entry points from Python.

    The linker may replace such a function by that of another kernel.
    """
    fresh: Any = compiled(kernel.py_func)
    fresh._cache = NullCache()
    signature = tuple(numba.typeof(argument) for argument in given)
    fresh.compile(signature)
    defined = re.findall(r"^define linkonce_odr .*?@\"?([\w.$]+)", fresh.inspect_llvm(signature), re.MULTILINE)
    return [name for name in defined if not name.startswith("NRT_")]


@numba.njit
def total(row):
    found = 0.0
    for number in row:
        found += np.exp(number)
    return found


def calls_another(row, rows):
    for place in range(rows.shape[0]):
        row[place] = total(rows[place]) + total(rows[place, ::2])


def test_kernel_that_calls_another_function_is_detected():
    assert functions_apart(compiled(calls_another), (FLOATS, np.ones((2, 16), np.float32))) != []


def test_every_kernel_has_arguments_here():
    assert kernels().keys() == arguments(np.float32).keys()


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("name", kernels())
def test_kernel_is_one_function_without_helper_functions(name, dtype):
    """Regression test: the bytes of an adapter depended on whether its process had compiled the kernels."""
    assert functions_apart(kernels()[name], arguments(STORED[dtype])[name]) == []

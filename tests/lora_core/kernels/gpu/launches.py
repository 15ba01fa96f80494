# pyright: standard, reportMissingImports=false
"""Records for which variants of kernels Triton would compile the launches that its interpreter gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import pytest
from torch import Tensor

DIVISOR = 16
"""Triton compiles a kernel once more for addresses and integers that are multiples of it."""
Variant = tuple[str, frozenset[tuple[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A launch of a kernel. `constants` include options such as the number of warps.

    `properties` are those of the other arguments for which Triton compiles variants too, by name.
    """

    kernel: str
    constants: Mapping[str, Any]
    properties: Mapping[str, Any]

    @property
    def variant(self) -> Variant:
        return self.kernel, frozenset(self.constants.items())


def recorded(monkeypatch: pytest.MonkeyPatch, *, runs: bool = True) -> list[Launch]:
    """Return the list to which later launches are added. Without `runs`, kernels are not computed."""
    from triton.runtime.interpreter import InterpretedFunction

    launches: list[Launch] = []
    original = InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(_launch(self, args, {k: v for k, v in kwargs.items() if k not in ("grid", "warmup")}))
        return original(self, *args, **kwargs) if runs else None

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return launches


def _launch(kernel: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Launch:
    parameters = signature(kernel.fn).parameters
    options = {name: value for name, value in kwargs.items() if name not in parameters}
    bound = signature(kernel.fn).bind(*args, **{name: kwargs[name] for name in kwargs if name in parameters})
    is_constant = {name: "constexpr" in str(parameter.annotation) for name, parameter in parameters.items()}
    constants = {name: value for name, value in bound.arguments.items() if is_constant[name]}
    general = kernel.kwargs.get("do_not_specialize") or ()
    properties = {
        name: _properties(value)
        for name, value in bound.arguments.items()
        if not is_constant[name] and name not in general
    }
    return Launch(kernel=kernel.fn.__name__, constants=constants | options, properties=properties)


def _properties(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % DIVISOR == 0
    if isinstance(value, int):
        return value == 1, value % DIVISOR == 0
    return type(value)

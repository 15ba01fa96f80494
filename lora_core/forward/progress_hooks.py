# pyright: basic
"""Callbacks during long computations, so that the worker doesn't take a silent trainer for a hung one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import find_linears

Between = Callable[[], None]


def silent() -> None:
    """Do nothing."""


@contextmanager
def calling_at_linears(base: BaseModel, between: Between) -> Iterator[None]:
    """Call `between` after every linear of the base model within the block, with or without an adapter.

    The interval is one matmul instead of a pass, which takes many seconds for a base model of 8B parameters on a CPU.
    """

    def tell(*_: object) -> None:
        between()

    hooks = [linear.register_forward_hook(tell) for linear in find_linears(base.model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

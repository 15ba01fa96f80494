# pyright: basic
"""Says time and again that a long computation goes on, for whoever would take its silence for the end of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import find_linears

Between = Callable[[], None]


def silent() -> None:
    """Tells nobody."""


@contextmanager
def calling_at_linears(base: BaseModel, between: Between) -> Iterator[None]:
    """Within the block `between` is called whenever a linear of the base has computed, with or without an adapter.

    So it is silent for one product, not for a pass, which on a CPU takes a base of 8B parameters many seconds.
    """

    def tell(*_: object) -> None:
        between()

    hooks = [linear.register_forward_hook(tell) for linear in find_linears(base.model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

# pyright: basic
"""The blocks of a base model, each of which a pass may leave out.

Outside a pass with a passage a block computes exactly what it did before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core.packing.packed_batch import current_pack


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """`path` of their list in the model; no modules where none was found, and then all is always run."""

    path: str = ""
    modules: tuple[nn.Module, ...] = ()

    def holds(self, module: str) -> bool:
        return bool(self.modules) and module.startswith(f"{self.path}.")

    def number_of(self, module: str) -> int:
        """Of the block that a module is in; 0 for one that is in none, as if it were in the lowest."""
        return int(module.removeprefix(f"{self.path}.").partition(".")[0]) if self.holds(module) else 0


def find_blocks(model: PreTrainedModel) -> Blocks:
    """The one list of modules that is as long as the model is deep."""
    depth = getattr(model.config, "num_hidden_layers", None)
    found = [
        (path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    lists = [(path, module) for path, module in found if len(module) == depth]
    if len(lists) != 1:
        return Blocks()
    ((path, module),) = lists
    return Blocks(path=path, modules=tuple(module))


def pass_block(forward: Callable[..., Any], number: int, *args: Any, **kwargs: Any) -> Any:
    """A block's `forward`, or where the passage leaves the block out its input, the hidden states [1, T, D], as it is.

    A family whose blocks give more than hidden states is not entered (lora_core/engine/prefix_cache.py).
    """
    pack = current_pack()
    passage = None if pack is None else pack.passage
    if passage is None:
        return forward(*args, **kwargs)
    hidden_1TD: Tensor = args[0]
    if number == passage.last:
        passage.left_TD = hidden_1TD[0]
    if number < passage.first or (passage.last is not None and number >= passage.last):
        return hidden_1TD
    if number == passage.first and passage.entering_TD is not None:
        hidden_1TD = passage.entering_TD[None]
    return forward(hidden_1TD, *args[1:], **kwargs)

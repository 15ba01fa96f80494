# pyright: basic
"""The blocks (decoder layers) of a base model, each of which a pass may skip.

Outside a pass with a BlockRange a block computes exactly what it computed before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core.packing.packed_batch import current_pack


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The list of blocks and its `path` in the model. `modules` is empty if none was found; then nothing is skipped."""

    path: str = ""
    modules: tuple[nn.Module, ...] = ()

    def holds(self, module: str) -> bool:
        return bool(self.modules) and module.startswith(f"{self.path}.")

    def number_of(self, module: str) -> int:
        """Return the number of the block that contains a module. 0 for a module outside blocks."""
        return int(module.removeprefix(f"{self.path}.").partition(".")[0]) if self.holds(module) else 0


def find_blocks(model: PreTrainedModel) -> Blocks:
    """Return the only ModuleList that has config.num_hidden_layers entries, or empty Blocks."""
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
    """Run a block's `forward`, or return its input, the hidden states [1, T, D], if the pass skips the block.

    Families whose blocks return more than hidden states never skip blocks (lora_core/engine/prefix_cache.py).
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

# pyright: basic
"""The blocks (decoder layers) of a base model."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """The list of blocks and its `path` in the model. `modules` is empty if none was found."""

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

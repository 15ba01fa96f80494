# pyright: basic
"""Makes the linears of a base model serve packs, and takes that back without a trace.

Each linear gets its own `forward` on the instance: no module is replaced, no name or parameter changes.
Outside a running pack an attached linear computes exactly what it did before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_core import attention
from lora_core.adapters import Target
from lora_core.config import ALL_LINEAR
from lora_core.errors import NoTargets
from lora_core.lora_linear import PackedDelta, PackedLinear, PlainWeight, pieces_of
from lora_core.pack import current_pack


def find_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linears that an adapter may change, by module path: all but the output head, as in PEFT."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def target_of(name: str, linear: nn.Module) -> Target:
    if isinstance(linear, Conv1D):
        return Target(name=name, in_features=linear.weight.shape[0], out_features=linear.weight.shape[1])
    assert isinstance(linear, nn.Linear)
    return Target(name=name, in_features=linear.in_features, out_features=linear.out_features)


def choose_targets(linears: dict[str, nn.Module], wanted: str | tuple[str, ...]) -> tuple[Target, ...]:
    """Linears that `wanted` names, in the model's order. Raises NoTargets for a name that matches nothing."""
    if wanted == ALL_LINEAR:
        return tuple(target_of(name, linear) for name, linear in linears.items())
    suffixes = (wanted,) if isinstance(wanted, str) else wanted
    for suffix in suffixes:
        if not any(matches(name, suffix) for name in linears):
            raise _no_targets(suffix, linears)
    return tuple(
        target_of(name, linear) for name, linear in linears.items() if any(matches(name, suffix) for suffix in suffixes)
    )


def matches(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _no_targets(suffix: str, linears: dict[str, nn.Module]) -> NoTargets:
    existing = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    return NoTargets(
        f"lora.target_modules names {suffix!r}, which matches no linear layer of this base model.",
        remedy=f"Use 'all-linear' or names among: {existing}.",
    )


class Attachment:
    """The attached state of one model; `anchor` is what makes autograd visit adapted linears."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.linears = find_linears(model)
        self.anchor = torch.zeros((), device=model.device, requires_grad=True)
        self._attention = model.config._attn_implementation or "eager"
        self._attach()

    def _attach(self) -> None:
        attention.register()
        self.model.set_attn_implementation(attention.NAME)
        for name, linear in self.linears.items():
            linear.forward = partial(forward_linear, linear, name, self.anchor)

    def detach(self) -> None:
        for linear in self.linears.values():
            del linear.forward
        self.model.set_attn_implementation(self._attention)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The untouched model, for a reference library to work on."""
        self.detach()
        try:
            yield
        finally:
            self._attach()


def forward_linear(linear: nn.Module, name: str, anchor: Tensor, x: Tensor) -> Tensor:
    """x [..., D] to [..., O]: the plain linear outside a pack, the packed one inside."""
    pack = current_pack()
    if pack is None:
        return type(linear).forward(linear, x)
    x_TD = x.reshape(-1, x.shape[-1])
    pieces = pieces_of(pack, name)
    plain = plain_weight(linear)
    if plain is not None:
        y_TO = PackedLinear.apply(x_TD, anchor if pieces else None, plain, pieces)
    else:
        y_TO = type(linear).forward(linear, x_TD)
        y_TO = PackedDelta.apply(y_TO, x_TD, anchor, pieces) if pieces else y_TO
    return y_TO.view(*x.shape[:-1], -1)


def plain_weight(linear: nn.Module) -> PlainWeight | None:
    """The weight that a GEMM can read; None for a quantised or sharded linear with a forward of its own."""
    if type(linear) is nn.Linear:
        return PlainWeight(weight_OD=linear.weight, bias_O=linear.bias)
    if type(linear) is Conv1D:
        return PlainWeight(weight_OD=linear.weight.T, bias_O=linear.bias)
    return None

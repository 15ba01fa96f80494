# pyright: basic
"""Recognizes parts of a model by the names of their classes and children."""

from collections.abc import Hashable

from torch import nn

NUMBERS_OF_A_BLOCK = {"layer_idx", "layer_index", "layer_number"}


def eps_of(module: nn.Module) -> float | None:
    """Return eps of an RMSNorm that has exactly one weight, or None for any other module."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = next(module.parameters())
    return eps if isinstance(eps, float) and weight.ndim == 1 else None


def is_norm_or_gated(module: nn.Module) -> bool:
    """Return whether a module is a norm of any kind, or an MLP of separate linears with a gate of any activation."""
    names = {name for name, _ in module.named_children()}
    return type(module).__name__.endswith("Norm") or names >= {"gate_proj", "up_proj", "down_proj"}


def is_gated_mlp(module: nn.Module) -> bool:
    """Return whether a module has the form down(silu(gate(x)) · up(x)), with linears of any kind."""
    names = [name for name, _ in module.named_children()]
    is_silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return is_silu and sorted(names) == ["act_fn", "down_proj", "gate_proj", "up_proj"]


def kind_of(part: nn.Module) -> Hashable:
    """Return the classes, settings, shapes and dtypes of all modules in `part`, without values and layer number.

    Parts of equal kind compute the same function of their weights and input.
    """
    return tuple(
        (
            name,
            type(module),
            tuple((name, tensor.shape, tensor.dtype) for name, tensor in module.named_parameters(recurse=False)),
            tuple(sorted((name, value) for name, value in vars(module).items() if _is_setting(name, value))),
        )
        for name, module in part.named_modules()
    )


def _is_setting(name: str, value: object) -> bool:
    return name not in NUMBERS_OF_A_BLOCK and isinstance(value, (bool, int, float, str))

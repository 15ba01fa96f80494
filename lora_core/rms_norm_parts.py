# pyright: basic
"""How a module is known to be an RMSNorm: by its class's name and its parts."""

from torch import nn


def eps_of(module: nn.Module) -> float | None:
    """None for whatever isn't an RMSNorm with one weight."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = next(module.parameters())
    return eps if isinstance(eps, float) and weight.ndim == 1 else None

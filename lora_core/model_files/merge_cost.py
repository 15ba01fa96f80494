# pyright: basic
"""Compares the cost of a pass: a merged model runs the same operations as its base model."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_core.base_model.model import load_base


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of both models on a CPU: the fastest of several forward passes over `num_tokens` tokens each, in seconds.

    `same_operations` is whether both run the same sequence of operations on tensors of the same shapes and dtypes.
    """

    base_seconds: float
    merged_seconds: float
    base_parameters: int
    merged_parameters: int
    same_layers: bool
    same_operations: bool
    num_tokens: int


def compare_cost(
    base_dir: Path,
    merged_dir: Path,
    *,
    dtype: Literal["bfloat16", "float32"],
    num_tokens: int = 128,
    num_passes: int = 10,
) -> Cost:
    """Time both models alternately, so that other load on the machine affects both equally.

    The fastest pass is compared, because other load only adds time.
    """
    models = [load_base(folder, dtype=dtype, device="cpu") for folder in (base_dir, merged_dir)]
    num_tokens = min(num_tokens, models[0].max_positions or num_tokens)
    ids = (torch.arange(num_tokens) % models[0].vocab_size)[None]
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for index in range(num_passes + 1):
            for model, measured in zip(models, seconds, strict=True):
                started = time.perf_counter()
                model.model(input_ids=ids, use_cache=False)
                if index:  # the first pass reads the weights from disk
                    measured.append(time.perf_counter() - started)
    layers = [[(name, type(layer)) for name, layer in model.model.named_modules()] for model in models]
    return Cost(
        base_seconds=min(seconds[0]),
        merged_seconds=min(seconds[1]),
        base_parameters=models[0].model.num_parameters(),
        merged_parameters=models[1].model.num_parameters(),
        same_layers=layers[0] == layers[1],
        same_operations=operations(models[0].model, ids) == operations(models[1].model, ids),
        num_tokens=num_tokens,
    )


Operation = tuple[str, tuple[tuple[tuple[int, ...], torch.dtype], ...]]
"""Name of an operation, and shape and dtype of each input tensor."""


@torch.no_grad()
def operations(model: nn.Module, ids: Tensor) -> list[Operation]:
    """Return torch's operations in a pass over `ids` [1, T], in order."""
    with _OperationRecorder() as recorder:
        model(input_ids=ids, use_cache=False)
    return recorder.operations


class _OperationRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.operations.append((str(func), tuple((tuple(part.shape), part.dtype) for part in read)))
        return func(*args, **(kwargs or {}))

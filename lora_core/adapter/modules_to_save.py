# pyright: basic
"""Modules that a job trains in full in addition to A and B: an output head, and the embeddings of chosen tokens.

Both start as copies of the base model's weights and live in the job's adapter. The base model doesn't change. Names
follow PEFT's files: `modules_to_save` and `trainable_token_indices`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core.config import LoraConfig
from lora_core.errors import NoTargets
from lora_core.module_paths import matches

TOKENS_SUFFIX = "token_adapter.trainable_tokens_delta"
"""PEFT's name. In spite of "delta", the tensor holds the embeddings themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTensor:
    """`name` is PEFT's without its prefix. `start(seed)` returns the initial values, of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    start: Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorViews:
    """Values in the compute dtype and gradient in fp32. Both are views of the adapter."""

    value: Tensor
    grad: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTensors:
    """The tensors that one job trains in full, in the order of the flat adapter.

    `modules` are the paths of the modules trained in full. `embedding` is the path of the embedding table whose rows
    `token_ids` are trained. With `is_tied` that table is also the base model's output head, which then uses the
    trained rows too.
    """

    tensors: tuple[TrainedTensor, ...] = ()
    modules: tuple[str, ...] = ()
    embedding: str = ""
    token_ids: tuple[int, ...] = ()
    is_tied: bool = False

    @property
    def num_numbers(self) -> int:
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors)

    @property
    def tokens_name(self) -> str:
        return f"{self.embedding}.{TOKENS_SUFFIX}"


def choose_trained(
    model: PreTrainedModel, lora: LoraConfig, *, head_path: str = "", head: Sequence[TrainedTensor] = ()
) -> TrainedTensors:
    """Return the modules and tokens of `lora` that are trained in full.

    `head` contains the tensors of a sequence head, which a job with such a head always trains. Raises NoTargets for a
    module or token that the base model doesn't have or that can't be trained in full.
    """
    modules = _modules_to_save(model, lora, head_path)
    tensors = list(head)
    if not head:
        tensors += [tensor for path in modules for tensor in module_tensors(path, model.get_submodule(path))]
    if not lora.trainable_token_indices:
        return TrainedTensors(tensors=tuple(tensors), modules=modules)
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, nn.Embedding)
    is_tied = output is not None and output.weight is table.weight
    _refuse_tokens(lora, num_tokens=table.num_embeddings, tied_head_is_saved=is_tied and bool(modules))
    ids = lora.trainable_token_indices
    path = path_of(model, table)
    rows = TrainedTensor(
        name=f"{path}.{TOKENS_SUFFIX}",
        shape=(len(ids), table.embedding_dim),
        start=lambda _seed: table.weight[torch.tensor(ids, device=table.weight.device)],
    )
    return TrainedTensors(tensors=(*tensors, rows), modules=modules, embedding=path, token_ids=ids, is_tied=is_tied)


def module_tensors(path: str, module: nn.Module) -> list[TrainedTensor]:
    """Return every parameter of a module, initialized with the base model's values."""
    return [
        TrainedTensor(name=f"{path}.{name}", shape=tuple(parameter.shape), start=partial(_current_value, parameter))
        for name, parameter in module.named_parameters()
    ]


def _current_value(parameter: Tensor, _seed: int) -> Tensor:
    return parameter


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def _modules_to_save(model: PreTrainedModel, lora: LoraConfig, head_path: str) -> tuple[str, ...]:
    """Return the module paths without duplicates. Only the head can be trained in full."""
    output = model.get_output_embeddings()
    path = head_path or ("" if output is None else path_of(model, output))
    if not lora.modules_to_save:
        return (head_path,) if head_path else ()
    for name in lora.modules_to_save:
        if not path or not matches(path, name):
            existing = any(matches(other, name) for other, _ in model.named_modules())
            reason = "which can't be trained in full" if existing else "which this base model doesn't have"
            raise NoTargets(
                f"lora.modules_to_save contains {name!r}, {reason}.",
                remedy=f"Name only the head, {path!r}. For embeddings of single tokens use "
                "lora.trainable_token_indices, and for linear layers lora.rank_pattern.",
            )
    return (path,)


def _refuse_tokens(lora: LoraConfig, *, num_tokens: int, tied_head_is_saved: bool) -> None:
    largest = max(lora.trainable_token_indices)
    if largest >= num_tokens:
        raise NoTargets(
            f"lora.trainable_token_indices contains the token ID {largest}, but the maximum for this base model is "
            f"{num_tokens - 1}.",
            remedy=f"Use token IDs from 0 to {num_tokens - 1}.",
        )
    if tied_head_is_saved:
        raise NoTargets(
            "lora.modules_to_save names the output head, whose weight this base model shares with the embeddings in "
            "lora.trainable_token_indices: the trained tokens would have two embeddings.",
            remedy="Remove lora.modules_to_save or lora.trainable_token_indices.",
        )

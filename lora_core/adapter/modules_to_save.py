# pyright: basic
"""What a job trains beside A and B: a whole output head of its own, and the embeddings of chosen tokens.

Both are copies that begin as the base model has them and lie in the job's adapter; the base stays as it is. The names
are those of PEFT's files: `modules_to_save`, and `trainable_token_indices`.
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
"""PEFT's name, although the tensor holds the embeddings themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTensor:
    """`name` is PEFT's, without its prefix; `start` gives the numbers [shape] that it begins with, from the seed."""

    name: str
    shape: tuple[int, ...]
    start: Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorViews:
    """Numbers in the compute dtype, gradient in fp32; both are views of the adapter."""

    value: Tensor
    grad: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTensors:
    """The tensors of one job in the order of its row; `modules` are the paths of those trained in full.

    `embedding` is the path of the table whose rows `token_ids` are trained; with `is_tied` the output head of the
    base is that very table, and has the trained rows as well.
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
    """What `lora` asks for beside its targets, and the `head` of a job that grades sequences, which it always trains.

    Raises NoTargets for what the base model hasn't, or can't be trained.
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
    """Every parameter of a module, as the base has it."""
    return [
        TrainedTensor(name=f"{path}.{name}", shape=tuple(parameter.shape), start=partial(_as_it_is, parameter))
        for name, parameter in module.named_parameters()
    ]


def _as_it_is(parameter: Tensor, _seed: int) -> Tensor:
    return parameter


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def _modules_to_save(model: PreTrainedModel, lora: LoraConfig, head_path: str) -> tuple[str, ...]:
    """Paths, each once. The head is the one module that can be trained in full."""
    output = model.get_output_embeddings()
    path = head_path or ("" if output is None else path_of(model, output))
    if not lora.modules_to_save:
        return (head_path,) if head_path else ()
    for name in lora.modules_to_save:
        if not path or not matches(path, name):
            existing = any(matches(other, name) for other, _ in model.named_modules())
            reason = "which can't be trained in full" if existing else "which this base model hasn't"
            raise NoTargets(
                f"lora.modules_to_save names {name!r}, {reason}.",
                remedy=f"Name its head, {path!r}; give embeddings of some tokens as "
                "lora.trainable_token_indices, and linear layers a rank by lora.rank_pattern.",
            )
    return (path,)


def _refuse_tokens(lora: LoraConfig, *, num_tokens: int, tied_head_is_saved: bool) -> None:
    largest = max(lora.trainable_token_indices)
    if largest >= num_tokens:
        raise NoTargets(
            f"lora.trainable_token_indices names token {largest}, but the base model has {num_tokens} tokens.",
            remedy=f"Name tokens of 0 to {num_tokens - 1}.",
        )
    if tied_head_is_saved:
        raise NoTargets(
            "lora.modules_to_save names the output head, whose weight this base model shares with the embeddings of "
            "lora.trainable_token_indices: the trained tokens would have two embeddings there.",
            remedy="Leave out one of the two.",
        )

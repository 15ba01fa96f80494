# pyright: basic
"""Classification heads: which module of a family's model is the head, what it reads, and one of each job's own.

Letters: T tokens, P sequences of the tick, D features, n sequences of a segment, C classes (1: a number).
A head lies in its job's adapter, with as many classes as the job has; what is between the last hidden states and the
head (a pooler, a dense layer) belongs to the base, and may have adapters.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core.adapter.modules_to_save import TensorViews, TrainedTensor
from lora_core.errors import UnsupportedModel
from lora_core.runtime.counter_rng import normal

Task = Literal["causal-lm", "sequence-classification"]
NUM_PLACEHOLDER_CLASSES = 2
"""Of the head that a base is loaded with, which no job trains."""
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskHead:
    """`path` of the head's module; which token of a sequence it reads, or their mean."""

    path: str
    pooling: Literal["first", "last", "mean"]


def task_head_of(model: nn.Module) -> TaskHead | None:
    """None for a model without a classification head."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    if isinstance(getattr(model, "score", None), nn.Linear):
        return TaskHead(path="score", pooling="last")
    config: Any = model.config
    pooling = "mean" if getattr(config, "classifier_pooling", "cls") == "mean" else "first"
    return TaskHead(path="classifier", pooling=pooling)


def refuse_unknown_head(model: PreTrainedModel) -> None:
    """Raises UnsupportedModel for a family whose head isn't one of those that are known here."""
    kind = model.config.model_type
    is_decoder = isinstance(getattr(model, "score", None), nn.Linear)
    if not is_decoder and kind not in ENCODERS:
        raise UnsupportedModel(
            f"Models of type {kind!r} aren't supported for classification: their head or attention isn't known here.",
            remedy=f"Choose a dense decoder, or an encoder of type {', '.join(ENCODERS)}.",
        )


def head_tensors(model: nn.Module, num_labels: int) -> list[TrainedTensor]:
    """Of a new head with `num_labels` classes: weights N(0, initializer_range²) by the job's seed, biases 0."""
    head = task_head_of(model)
    assert head is not None
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    tensors: list[TrainedTensor] = []
    last = _last_linear(model.get_submodule(head.path))
    for name, parameter in model.get_submodule(head.path).named_parameters():
        is_last = parameter is last.weight or parameter is last.bias
        shape = (num_labels, *parameter.shape[1:]) if is_last else tuple(parameter.shape)
        path = f"{head.path}.{name}"
        start = partial(_normal, path, shape, 0.0 if parameter.ndim == 1 else deviation)
        tensors.append(TrainedTensor(name=path, shape=shape, start=start))
    return tensors


def _last_linear(head: nn.Module) -> nn.Linear:
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]


def _normal(path: str, shape: tuple[int, ...], deviation: float, seed: int) -> Tensor:
    """fp32 numbers that depend on (seed, path) alone."""
    numbers = normal("head", seed, path, count=math.prod(shape)) * deviation
    return torch.from_numpy(numbers.astype(np.float32)).view(shape)


def fill_placeholder(model: nn.Module) -> None:
    """Give the base's own head numbers, for no file holds those of a job."""
    head = task_head_of(model)
    assert head is not None
    for tensor in head_tensors(model, NUM_PLACEHOLDER_CLASSES):
        parameter = model.get_parameter(tensor.name)
        set_parameter(model, tensor.name, tensor.start(0).to(parameter.dtype))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def own_head(model: nn.Module, tensors: Mapping[str, Tensor | TensorViews], *, path: str) -> nn.Module:
    """The head's module with numbers of a job (by their whole path) in it, not copied: one that nobody shares."""
    head = copy.deepcopy(model.get_submodule(path))
    for name, found in tensors.items():
        value = found.value if isinstance(found, TensorViews) else found
        if name.startswith(f"{path}."):
            set_parameter(head, name.removeprefix(f"{path}."), value)
    return head.requires_grad_(True)


def pooled_hidden(model: PreTrainedModel, h_TD: Tensor, ids_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[P, D]: of each sequence the hidden state that the head reads, or their mean.

    The last token is the last that isn't padding, as in transformers: a padding token may end a sequence.
    """
    head = task_head_of(model)
    assert head is not None
    starts = np.cumsum([0, *lengths[:-1]])
    if head.pooling == "mean":
        parts = h_TD.split(list(lengths))
        return torch.stack([part.sum(0) / len(part) for part in parts])
    if head.pooling == "first":
        places = starts
    else:
        padding = model.config.get_text_config().pad_token_id
        places = [
            start + _last_place(ids, padding) for start, ids in zip(starts, ids_T.split(list(lengths)), strict=True)
        ]
    return h_TD[torch.as_tensor(np.asarray(places), device=h_TD.device)]


def _last_place(ids: Tensor, padding: int | None) -> int:
    if padding is None:
        return len(ids) - 1
    found = (ids != padding).nonzero()
    return int(found[-1]) if len(found) else 0


def between(model: Any, h_PD: Tensor) -> Tensor:
    """[P, D]: what a family computes between pooling and its head."""
    if getattr(model.base_model, "pooler", None) is not None:
        return cast(Tensor, model.base_model.pooler(h_PD[:, None]))
    if model.config.model_type == "modernbert":
        return cast(Tensor, model.head(h_PD))
    return h_PD


def class_logits(model: PreTrainedModel, head: nn.Module, h_nD: Tensor) -> Tensor:
    """fp32 [n, C]. The head of RoBERTa takes its first token itself."""
    if isinstance(head, nn.Linear):
        return head(h_nD).float()
    return head(h_nD[:, None]).float()


def positions_of(model: PreTrainedModel, position_ids: Tensor, input_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """RoBERTa counts from behind the padding token's id, and leaves padding tokens out; others from 0."""
    if not counts_from_padding(model.config):
        return position_ids
    padding = cast(int, model.config.pad_token_id)
    kept = (input_ids[0] != padding).long()
    parts = [part.cumsum(0) * part + padding for part in kept.split(list(lengths))]
    return torch.cat(parts)[None]


def counts_from_padding(config: Any) -> bool:
    return config.model_type in ("roberta", "xlm-roberta")

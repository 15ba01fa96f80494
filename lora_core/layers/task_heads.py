# pyright: basic
"""Classification heads: the head module of each model family, its input, and a separate head for each job.

Shape suffixes: T tokens, P sequences of the pack, D features, n sequences of a segment, C classes (1 for regression).
A head is part of its job's adapter, with the job's number of classes. Layers between the last hidden states and the
head (a pooler or a dense layer) belong to the base model and can have adapters.
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
from lora_core.runtime.transfers import upload

Task = Literal["causal-lm", "sequence-classification"]
NUM_PLACEHOLDER_CLASSES = 2
"""Classes of the head with which a base model is loaded. No job trains it."""
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskHead:
    """The `path` of the head module, and the token it reads of each sequence ("mean" for all of them)."""

    path: str
    pooling: Literal["first", "last", "mean"]


def task_head_of(model: nn.Module) -> TaskHead | None:
    """Return the classification head of a model, or None."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    if isinstance(getattr(model, "score", None), nn.Linear):
        return TaskHead(path="score", pooling="last")
    config: Any = model.config
    pooling = "mean" if getattr(config, "classifier_pooling", "cls") == "mean" else "first"
    return TaskHead(path="classifier", pooling=pooling)


def refuse_unknown_head(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel for a model family whose head is unknown."""
    kind = model.config.model_type
    is_decoder = isinstance(getattr(model, "score", None), nn.Linear)
    if not is_decoder and kind not in ENCODERS:
        raise UnsupportedModel(
            f"Models of type {kind!r} aren't supported for classification: their head or attention is unknown.",
            remedy=f"Choose a dense decoder, or an encoder of type {', '.join(ENCODERS)}.",
        )


def head_tensors(model: nn.Module, num_labels: int) -> list[TrainedTensor]:
    """Return the tensors of a new head: weights N(0, initializer_range²) from the job's seed, biases 0."""
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
    """Return fp32 numbers that depend on (seed, path) alone."""
    numbers = normal("head", seed, path, count=math.prod(shape)) * deviation
    return torch.from_numpy(numbers.astype(np.float32)).view(shape)


def fill_placeholder(model: nn.Module) -> None:
    """Initialize the base model's own head, which is not in its files."""
    head = task_head_of(model)
    assert head is not None
    for tensor in head_tensors(model, NUM_PLACEHOLDER_CLASSES):
        parameter = model.get_parameter(tensor.name)
        set_parameter(model, tensor.name, tensor.start(0).to(parameter.dtype))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def own_head(model: nn.Module, tensors: Mapping[str, Tensor | TensorViews], *, path: str) -> nn.Module:
    """Return a new head module that uses a job's tensors (keyed by full path) without copying them."""
    head = copy.deepcopy(model.get_submodule(path))
    for name, found in tensors.items():
        value = found.value if isinstance(found, TensorViews) else found
        if name.startswith(f"{path}."):
            set_parameter(head, name.removeprefix(f"{path}."), value)
    return head.requires_grad_(True)


def pooled_hidden(
    model: PreTrainedModel, h_TD: Tensor, ids_T: np.ndarray[Any, Any], lengths: tuple[int, ...]
) -> Tensor:
    """Return [P, D]: the hidden state that the head reads of each sequence, or the mean over the sequence.

    As in transformers, "last" is the last token that isn't padding, because a padding token may end a sequence.
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
            start + _last_place(ids, padding) for start, ids in zip(starts, np.split(ids_T, starts[1:]), strict=True)
        ]
    return h_TD[upload([np.asarray(places, np.int64)], h_TD.device)[0]]


def _last_place(ids: np.ndarray[Any, Any], padding: int | None) -> int:
    if padding is None:
        return len(ids) - 1
    found = np.flatnonzero(ids != padding)
    return int(found[-1]) if len(found) else 0


def between(model: Any, h_PD: Tensor) -> Tensor:
    """Return [P, D] after the layers between pooling and head, if the family has any."""
    if getattr(model.base_model, "pooler", None) is not None:
        return cast(Tensor, model.base_model.pooler(h_PD[:, None]))
    if model.config.model_type == "modernbert":
        return cast(Tensor, model.head(h_PD))
    return h_PD


def class_logits(model: PreTrainedModel, head: nn.Module, h_nD: Tensor) -> Tensor:
    """Return logits, fp32 [n, C]. The head of RoBERTa selects the first token itself."""
    if isinstance(head, nn.Linear):
        return head(h_nD).float()
    return head(h_nD[:, None]).float()


def positions_of(
    model: PreTrainedModel, position_ids: Tensor, ids_T: np.ndarray[Any, Any], lengths: tuple[int, ...]
) -> Tensor:
    """Return position ids [1, T]. RoBERTa counts from the padding id + 1 and skips padding tokens, others from 0."""
    if not counts_from_padding(model.config):
        return position_ids
    padding = cast(int, model.config.pad_token_id)
    kept = (ids_T != padding).astype(np.int64)
    parts = [part.cumsum() * part + padding for part in np.split(kept, np.cumsum(lengths)[:-1])]
    return upload([np.concatenate(parts)[None]], position_ids.device)[0]


def counts_from_padding(config: Any) -> bool:
    return config.model_type in ("roberta", "xlm-roberta")

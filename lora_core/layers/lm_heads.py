# pyright: basic
"""The output heads of a pack: the base model's head, and heads or token embeddings that single jobs train.

Shape suffixes: L labels of the pack, l labels of a segment, C labels of a chunk, D features, V vocabulary, K trained
tokens. Jobs with the base model's head are computed together, each other job separately.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.adapter.modules_to_save import TensorViews
from lora_core.kernels.accumulation import add_product
from lora_core.losses.chunked_cross_entropy import LABEL_MULTIPLE, Head, TokenScores, score_labels, weighted_loss
from lora_core.packing.packed_batch import BatchSegment, PackedBatch
from lora_core.runtime.transfers import upload


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedHead(Head):
    """A head whose weight and optional bias are in a job's adapter."""

    weight: TensorViews
    bias: TensorViews | None

    def product_gradient(self, dz_CV: Tensor, h_CD: Tensor) -> Tensor:
        add_product(self.weight.grad, dz_CV.T, h_CD)
        if self.bias is not None:
            self.bias.grad.add_(dz_CV.sum(0))
        return dz_CV @ self.weight_VD


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRowsHead(Head):
    """The base model's embedding table as head, with a job's trained rows [K, D] in place of its tokens."""

    ids_K: Tensor
    rows: TensorViews

    def product(self, h_CD: Tensor, num_used: int | None = None) -> Tensor:
        z_CV = F.linear(h_CD, self.weight_VD, self.bias_V)
        bias_K = None if self.bias_V is None else self.bias_V[self.ids_K]
        return z_CV.index_copy_(1, self.ids_K, F.linear(h_CD, self.rows.value, bias_K))

    def product_gradient(self, dz_CV: Tensor, h_CD: Tensor) -> Tensor:
        dz_CK = dz_CV[:, self.ids_K]
        self.rows.grad.add_(dz_CK.T @ h_CD)
        dz_CV.index_fill_(1, self.ids_K, 0)  # in place: a copy would take as much memory as the logits of the chunk
        return dz_CV @ self.weight_VD + dz_CK @ self.rows.value


def head_of(head: Head, adapter: FlatAdapter) -> Head:
    """Return the output head of a job: the base model's `head`, unless the job trains a head or tied embeddings."""
    trained = adapter.trained
    options = {field.name: getattr(head, field.name) for field in fields(Head)}
    if trained.modules:
        (path,) = trained.modules
        weight, bias = adapter.tensors[f"{path}.weight"], adapter.tensors.get(f"{path}.bias")
        options |= {"weight_VD": weight.value, "bias_V": None if bias is None else bias.value}
        return SavedHead(**options, weight=weight, bias=bias)
    if trained.is_tied:
        (ids_K,) = upload([np.array(trained.token_ids)], head.weight_VD.device)
        return TokenRowsHead(**options, ids_K=ids_K, rows=adapter.tensors[trained.tokens_name])
    return head


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadGroup:
    """Segments that share a head, and the positions of their labels."""

    head: Head
    places: slice | Tensor
    segments: tuple[int, ...]


def score_by_head(h_LD: Tensor, head: Head, pack: PackedBatch) -> TokenScores:
    """Return the scores of all labels without a gradient. `head` is the base model's."""
    groups = _groups(head, pack)
    parts = [score_labels(h_LD[group.places], group.head, pack.labels_L[group.places]) for group in groups]
    return _in_order(parts, groups, pack)


def loss_by_head(h_LD: Tensor, head: Head, pack: PackedBatch, weights_L: Tensor) -> tuple[Tensor, TokenScores]:
    """Return Σ weight · cross-entropy over all labels, which is differentiable in h, and the scores of the labels.

    Gradients of trained heads are already accumulated into their adapters.
    """
    groups, smoothing_L = _groups(head, pack), pack.label_smoothing_L
    results = [
        weighted_loss(
            h_LD[group.places],
            group.head,
            pack.labels_L[group.places],
            weights_L[group.places],
            None if smoothing_L is None else smoothing_L[group.places],
        )
        for group in groups
    ]
    losses = torch.stack([loss for loss, _ in results])
    return losses.sum(), _in_order([scores for _, scores in results], groups, pack)


def logits_by_head(h_SD: Tensor, head: Head, pack: PackedBatch) -> Tensor:
    """Return the logits [S, V] of one token of each sequence, whose last hidden states are h. `head` is the base's.

    Heads are computed on padded rows, so that the bits of a row don't depend on the number of others.
    """
    heads = [head_of(head, segment.adapter) for segment in pack.segments]
    logits_SV: Tensor | None = None
    for own in {id(own): own for own in heads}.values():
        rows = [
            np.arange(segment.graded.first, segment.graded.last)
            for segment, of_segment in zip(pack.segments, heads, strict=True)
            if of_segment is own
        ]
        (places_l,) = upload([np.concatenate(rows)], h_SD.device)
        h_lD = h_SD[places_l]
        padded_lD = F.pad(h_lD, (0, 0, 0, -len(h_lD) % LABEL_MULTIPLE))
        if own is head:  # the only one that is batch-invariant for any number of rows
            logits_lV = own.logits(padded_lD, len(h_lD))
        else:
            logits_lV = torch.cat([own.logits(part) for part in padded_lD.split(LABEL_MULTIPLE)])
        logits_lV = logits_lV[: len(h_lD)]
        if len(places_l) == len(h_SD):
            return logits_lV
        if logits_SV is None:
            logits_SV = logits_lV.new_empty(len(h_SD), logits_lV.shape[1])
        logits_SV[places_l] = logits_lV
    assert logits_SV is not None
    return logits_SV


def _groups(head: Head, pack: PackedBatch) -> list[HeadGroup]:
    """Return one group for all jobs with the base model's head, and one for each other job."""
    heads = [head_of(head, segment.adapter) for segment in pack.segments]
    shared = tuple(index for index, own in enumerate(heads) if own is head)
    if len(shared) == len(heads):
        return [HeadGroup(head=head, places=slice(None), segments=shared)]
    others = [
        HeadGroup(head=own, places=labels_of(pack.segments[index]), segments=(index,))
        for index, own in enumerate(heads)
        if own is not head
    ]
    if not shared:
        return others
    ranges = [np.arange(pack.segments[index].label_start, pack.segments[index].label_stop) for index in shared]
    (places_l,) = upload([np.concatenate(ranges)], pack.labels_L.device)
    return [HeadGroup(head=head, places=places_l, segments=shared), *others]


def labels_of(segment: BatchSegment) -> slice:
    return slice(segment.label_start, segment.label_stop)


def _in_order(parts: list[TokenScores], groups: list[HeadGroup], pack: PackedBatch) -> TokenScores:
    """Return the scores of all groups in the order of the pack's labels."""
    if len(groups) == 1:
        return parts[0]
    losses_L = torch.empty(len(pack.labels_L), device=pack.labels_L.device)
    correct_L = torch.empty_like(losses_L, dtype=torch.bool)
    for scores, group in zip(parts, groups, strict=True):
        losses_L[group.places], correct_L[group.places] = scores.losses_L, scores.correct_L
    return TokenScores(losses_L=losses_L, correct_L=correct_L)

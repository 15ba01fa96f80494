# pyright: basic
"""Passes of a pack through a causal language model: forward, and backward in training.

Shape suffixes: T tokens, L labels, D features, l labels of a segment, S its sequences. For preference objectives the
weight of a label depends on the whole answers, so the head is computed twice, chunk by chunk each time.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.base_model.model import BaseModel
from lora_core.forward.classification import run_task_evaluation, run_task_training
from lora_core.layers.lm_heads import head_of, labels_of, loss_by_head, score_by_head
from lora_core.layers.task_heads import ENCODERS, positions_of
from lora_core.losses.chunked_cross_entropy import score_labels
from lora_core.losses.preference import AnswerScores, SliceScores, score_answers
from lora_core.packing.packed_batch import BatchSegment, PackedBatch, running
from lora_core.runtime.transfers import download, upload


def hidden_states(base: BaseModel, pack: PackedBatch) -> Tensor:
    """Return the last hidden states [T, D], with each segment's adapter applied."""
    options: dict[str, Any] = {} if pack.token_types is None else {"token_type_ids": pack.token_types}
    positions = positions_of(base.model, pack.position_ids, pack.host_ids_T, pack.sequence_lengths)
    if base.model.config.model_type not in ENCODERS:
        options["use_cache"] = False
    with running(pack, base.kernels):
        output = base.model.base_model(input_ids=pack.input_ids, position_ids=positions, **options)
    return output.last_hidden_state[0]


def run_training(base: BaseModel, pack: PackedBatch) -> list[SliceScores]:
    """Run forward and backward. Adds gradients to the adapters and returns the scores of each segment.

    The loss is a sum over disjoint adapters on a frozen base model, so each adapter gets exactly its own gradient.
    """
    if base.task != "causal-lm":
        with torch.enable_grad():
            return run_task_training(base, pack, hidden_states(base, pack))
    reference_L = _reference_losses(base, pack)
    with torch.enable_grad():
        h_LD = hidden_states(base, pack)[pack.label_positions_L]
        answers = _answers_of_segments(base, pack, h_LD, reference_L)
        weights_L = _label_weights(pack, answers)
        loss, scores = loss_by_head(h_LD, base.head(), pack, weights_L)
        loss.backward()
    losses_L, correct_L = download([scores.losses_L, scores.correct_L])
    return _by_segment(pack, losses_L, correct_L, answers)


@torch.no_grad()
def run_evaluation(base: BaseModel, pack: PackedBatch) -> list[SliceScores]:
    """Run the forward pass and return the scores of each segment."""
    if base.task != "causal-lm":
        return run_task_evaluation(base, pack, hidden_states(base, pack))
    reference_L = _reference_losses(base, pack)
    h_LD = hidden_states(base, pack)[pack.label_positions_L]
    scores = score_by_head(h_LD, base.head(), pack)
    losses_L, correct_L, *reference = download([scores.losses_L, scores.correct_L, *_present(reference_L)])
    reference_L = reference[0] if reference else None
    answers = [_score_segment(segment, losses_L[labels_of(segment)], reference_L) for segment in pack.segments]
    return _by_segment(pack, losses_L, correct_L, answers)


@torch.no_grad()
def _reference_losses(base: BaseModel, pack: PackedBatch) -> Tensor | None:
    """Return the cross-entropy of each label under the reference model, or None if no objective needs it."""
    if pack.reference is None:
        return None
    h_LD = hidden_states(base, pack.reference)[pack.reference.label_positions_L]
    return score_by_head(h_LD, base.head(), pack.reference).losses_L


@torch.no_grad()
def _answers_of_segments(
    base: BaseModel, pack: PackedBatch, h_LD: Tensor, reference_L: Tensor | None
) -> list[AnswerScores | None]:
    """Run the head for segments with a preference objective, to get the slope of each answer."""
    losses: dict[int, Tensor] = {}
    for index, segment in enumerate(pack.segments):
        labels = labels_of(segment)
        if segment.compared is not None:
            head = head_of(base.head(), segment.adapter)
            losses[index] = score_labels(h_LD[labels], head, pack.labels_L[labels]).losses_L
    if not losses:
        return [None] * len(pack.segments)
    read = download([*losses.values(), *_present(reference_L)])
    of_segments = dict(zip(losses, read, strict=False))
    reference_L = None if reference_L is None else read[-1]
    return [
        _score_segment(segment, of_segments[index], reference_L) if index in of_segments else None
        for index, segment in enumerate(pack.segments)
    ]


def _present(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _score_segment(segment: BatchSegment, losses_l: Tensor, reference_L: Tensor | None) -> AnswerScores | None:
    """Return the scores of the segment's answers, or None. The losses are on the host."""
    compared = segment.compared
    if compared is None:
        return None
    reference_l = None
    if compared.objective.needs_reference:
        assert reference_L is not None
        reference_l = reference_L[compared.reference_start :][: len(losses_l)]
    return score_answers(compared, losses_l, reference_l)


def _label_weights(pack: PackedBatch, answers: list[AnswerScores | None]) -> Tensor:
    """Return fp32 [L]: the pack's weights, or minus the slope of the answer for labels of preference objectives.

    The sign is negative because the cross-entropy is minus the log-probability.
    """
    if not any(answers):
        return pack.label_weights_L
    weights_L = pack.label_weights_L.clone()
    places: list[slice] = []
    arrays: list[np.ndarray[Any, Any]] = []
    for segment, scores in zip(pack.segments, answers, strict=True):
        if segment.compared is not None and scores is not None:
            weights_S = (-segment.compared.weight * scores.slopes_S).float().numpy()
            places.append(labels_of(segment))
            arrays.append(weights_S.repeat(segment.compared.num_labels))
    for place, weights_l in zip(places, upload(arrays, weights_L.device), strict=True):
        weights_L[place].copy_(weights_l)
    return weights_L


def _by_segment(
    pack: PackedBatch, losses_L: Tensor, correct_L: Tensor, answers: list[AnswerScores | None]
) -> list[SliceScores]:
    return [
        _slice_scores(segment, losses_L, correct_L, of_answers)
        for segment, of_answers in zip(pack.segments, answers, strict=True)
    ]


def _slice_scores(
    segment: BatchSegment, losses_L: Tensor, correct_L: Tensor, of_answers: AnswerScores | None
) -> SliceScores:
    correct_l = correct_L[segment.label_start : segment.label_stop]
    if segment.compared is None or of_answers is None:
        loss_sum = float(losses_L[segment.label_start : segment.label_stop].sum())
        return SliceScores(loss_sum=loss_sum, num_correct=int(correct_l.sum()))
    counted = correct_l.split(segment.compared.num_labels)[:: segment.compared.objective.rows_per_example]
    return SliceScores(
        loss_sum=of_answers.loss_sum,
        num_correct=sum(int(answer.sum()) for answer in counted),
        rewards=of_answers.rewards,
    )

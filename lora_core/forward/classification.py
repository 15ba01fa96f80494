# pyright: basic
"""Passes of a pack through a base model with classification heads, which score sequences instead of tokens.

Shape suffixes: P sequences of the pack, D features, n sequences of a segment, C classes. The layers between pooling
and head have sequences as rows, so they get a pack whose segments count sequences.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.adapter.modules_to_save import TrainedTensors, choose_trained, module_tensors
from lora_core.base_model.model import BaseModel
from lora_core.config import LoraConfig, ObjectiveConfig
from lora_core.errors import ConfigError
from lora_core.layers.task_heads import between, class_logits, head_tensors, own_head, pooled_hidden, task_head_of
from lora_core.losses.preference import RewardSums, SliceScores
from lora_core.packing.packed_batch import ROW_MULTIPLE, BatchSegment, Graded, PackedBatch, running
from lora_core.runtime.transfers import download, upload


def refuse_other_task(base: BaseModel, objective: ObjectiveConfig) -> None:
    """Raise ConfigError if the base model is loaded for a different task than the objective's."""
    if objective.grades_sequences != (base.task == "sequence-classification"):
        needed = "sequence-classification" if objective.grades_sequences else "causal-lm"
        raise ConfigError(
            f"The objective {objective.kind!r} needs a base model for {needed}, but this one is for {base.task}.",
            remedy=f"Load the base model with the task {needed!r}, or choose another objective.",
        )


def trained_tensors(base: BaseModel, lora: LoraConfig, objective: ObjectiveConfig) -> TrainedTensors:
    """Return the tensors that a job trains in addition to A and B. Raises NoTargets."""
    head = task_head_of(base.model)
    if head is None:
        return choose_trained(base.model, lora)
    tensors = head_tensors(base.model, objective.num_labels)
    return choose_trained(base.model, lora, head_path=head.path, head=tensors)


def head_alone(base: BaseModel, adapter: FlatAdapter) -> TrainedTensors:
    """Return the current head of `adapter`, for an adapter that has nothing else. Empty without a sequence head."""
    head = task_head_of(base.model)
    if head is None:
        return TrainedTensors()
    tensors = [
        replace(tensor, start=lambda _seed, name=tensor.name: adapter.tensors[name].value)
        for tensor in adapter.trained.tensors
        if tensor.name.startswith(f"{head.path}.")
    ]
    return TrainedTensors(tensors=tuple(tensors), modules=(head.path,))


def placeholder_head(base: BaseModel) -> TrainedTensors:
    """Return the head that the base model was loaded with, for synthetic adapters. Empty without a sequence head."""
    head = task_head_of(base.model)
    if head is None:
        return TrainedTensors()
    tensors = module_tensors(head.path, base.model.get_submodule(head.path))
    return TrainedTensors(tensors=tuple(tensors), modules=(head.path,))


def run_task_training(base: BaseModel, pack: PackedBatch, h_TD: Tensor) -> list[SliceScores]:
    """Compute losses and their backward for the pooled `h_TD`. Gradients are added to the adapters.

    Call it with gradients enabled. Returns the scores of each segment. They are read after the backward, so that the
    caller measures the time of the whole pass.
    """
    h_PD = head_inputs(base, pack, h_TD)
    losses: list[Tensor] = []
    scores: list[Tensor] = []
    heads: list[tuple[FlatAdapter, torch.nn.Module]] = []
    for segment in pack.segments:
        head = head_module(base, segment.adapter)
        logits_nC = class_logits(base.model, head, h_PD[segment.graded.first : segment.graded.last])
        loss, score = score_segment(logits_nC, segment.graded)
        losses.append(loss * segment.graded.weight)
        scores.append(score)
        heads.append((segment.adapter, head))
    torch.stack(losses).sum().backward()
    for adapter, head in heads:
        _accumulate(base, adapter, head)
    return list(map(slice_scores, download(scores)))


def run_task_evaluation(base: BaseModel, pack: PackedBatch, h_TD: Tensor) -> list[SliceScores]:
    h_PD = head_inputs(base, pack, h_TD)
    scores = [score_segment(_logits(base, segment, h_PD), segment.graded)[1] for segment in pack.segments]
    return list(map(slice_scores, download(scores)))


def _logits(base: BaseModel, segment: BatchSegment, h_PD: Tensor) -> Tensor:
    part_nD = h_PD[segment.graded.first : segment.graded.last]
    return class_logits(base.model, head_module(base, segment.adapter), part_nD)


def head_inputs(base: BaseModel, pack: PackedBatch, h_TD: Tensor) -> Tensor:
    """Return the inputs of the heads, [P, D], with padding rows at the end."""
    h_PD = pooled_hidden(base.model, h_TD, pack.host_ids_T, pack.sequence_lengths)
    h_PD = F.pad(h_PD, (0, 0, 0, -len(h_PD) % ROW_MULTIPLE))
    segments = tuple(
        replace(segment, start=segment.graded.first, stop=segment.graded.last) for segment in pack.segments
    )
    with running(replace(pack, segments=segments, is_pooled=True), base.kernels):
        return between(base.model, h_PD)


def head_module(base: BaseModel, adapter: FlatAdapter) -> torch.nn.Module:
    head = task_head_of(base.model)
    assert head is not None
    return own_head(base.model, adapter.tensors, path=head.path)


def _accumulate(base: BaseModel, adapter: FlatAdapter, head: torch.nn.Module) -> None:
    found = task_head_of(base.model)
    assert found is not None
    for name, parameter in head.named_parameters():
        if parameter.grad is not None:
            adapter.tensors[f"{found.path}.{name}"].grad.add_(parameter.grad)


def score_segment(logits_nC: Tensor, graded: Graded) -> tuple[Tensor, Tensor]:
    """Return the sum of losses, which is differentiable, and the scores of a segment on the device (`slice_scores`)."""
    if graded.objective.kind == "reward":
        return _reward_loss(logits_nC[:, 0], graded.objective)
    (labels_n,) = upload([np.array(graded.labels, np.float32)], logits_nC.device)
    if graded.objective.num_labels == 1:
        loss = (logits_nC[:, 0] - labels_n).square().sum()
        num_correct = loss.new_zeros(())
    else:
        loss = F.cross_entropy(logits_nC, labels_n.long(), reduction="sum")
        num_correct = (logits_nC.argmax(-1) == labels_n.long()).sum()
    return loss, torch.stack([loss.detach().double(), num_correct.double()])


def slice_scores(scores: Tensor) -> SliceScores:
    """Return the scores of `score_segment` that are on the host: fp64 (loss, number of correct answers) and for a
    reward model (sum of chosen rewards, sum of rejected rewards)."""
    loss_sum, num_correct, *rewards = scores.tolist()
    if not rewards:
        return SliceScores(loss_sum=loss_sum, num_correct=int(num_correct))
    chosen, rejected = rewards
    sums = RewardSums(chosen=chosen, rejected=rejected, num_ordered=int(num_correct))
    return SliceScores(loss_sum=loss_sum, num_correct=int(num_correct), rewards=sums)


def _reward_loss(rewards_n: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Reward model loss: -log sigmoid(r_chosen - r_rejected) (Bradley and Terry; arXiv 2203.02155, equation 1).

    As in TRL, `center_rewards_coefficient` · (r_chosen + r_rejected)² keeps rewards near 0 (arXiv 2312.09244).
    """
    chosen, rejected = rewards_n.view(-1, 2).unbind(1)
    loss = -F.logsigmoid(chosen - rejected).sum()
    loss = loss + objective.center_rewards_coefficient * (chosen + rejected).square().sum()
    sums = [part.detach().double().sum() for part in (chosen, rejected)]
    return loss, torch.stack([loss.detach().double(), (chosen > rejected).sum().double(), *sums])

# pyright: basic
"""What the log probabilities of a segment's answers come to: a loss, rewards, and what each weighs in the backward.

Letters: S sequences of the segment, each an answer; P pairs of them. One place for pairs (preference.py) and for
single answers (kto.py), so that a pass of the pack needn't tell them apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.losses.kto import SingleAnswers, score_single
from lora_core.losses.preference import Answers, score_pairs
from lora_core.packing.packed_batch import Compared


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSums:
    """Over the pairs of a slice; `num_ordered` of them give the chosen answer the greater reward.

    Of single answers the sums are over the desirable ones and over the others.
    """

    chosen: float
    rejected: float
    num_ordered: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceScores:
    loss_sum: float
    num_correct: int
    rewards: RewardSums | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerScores:
    """`slopes_S` fp64 [S] on the host: d loss / d log probability. Where KTO measures its reference point, the sum is
    that of log ratios, there are no rewards, and nothing is differentiated."""

    loss_sum: float
    slopes_S: Tensor
    rewards: RewardSums | None


def score_answers(compared: Compared, losses_l: Tensor, reference_l: Tensor | None) -> AnswerScores:
    """`losses_l`: cross-entropy of each label, and under the base alone where the objective compares with it."""
    logps_S = _logps(losses_l, compared)
    reference_S = None if reference_l is None else _logps(reference_l, compared)
    if compared.objective.kind == "kto":
        assert reference_S is not None
        return _single(compared, logps_S, reference_S)
    return _pairs(compared, logps_S, reference_S)


def _single(compared: Compared, logps_S: Tensor, reference_S: Tensor) -> AnswerScores:
    ratios_S = logps_S - reference_S
    if compared.reference_point is None:
        return AnswerScores(loss_sum=float(ratios_S.sum()), slopes_S=torch.zeros_like(ratios_S), rewards=None)
    desirable_S = torch.tensor(compared.labels) == 1
    answers = SingleAnswers(ratios_S=ratios_S, desirable_S=desirable_S, reference_point=compared.reference_point)
    scores = score_single(compared.objective, answers)
    rewards = RewardSums(
        chosen=float(scores.rewards_S[desirable_S].sum()),
        rejected=float(scores.rewards_S[~desirable_S].sum()),
        num_ordered=int(scores.is_gain_S.sum()),
    )
    return AnswerScores(loss_sum=float(scores.loss_S.sum()), slopes_S=scores.slopes_S, rewards=rewards)


def _pairs(compared: Compared, logps_S: Tensor, reference_S: Tensor | None) -> AnswerScores:
    answers = Answers(
        logps_P2=logps_S.view(-1, 2),
        reference_P2=None if reference_S is None else reference_S.view(-1, 2),
        num_labels_P2=torch.tensor(compared.num_labels, dtype=torch.float64).view(-1, 2),
    )
    scores = score_pairs(compared.objective, answers)
    chosen_P, rejected_P = scores.rewards_P2.unbind(1)
    rewards = RewardSums(
        chosen=float(chosen_P.sum()),
        rejected=float(rejected_P.sum()),
        num_ordered=int((chosen_P > rejected_P).sum()),
    )
    return AnswerScores(loss_sum=float(scores.loss_P.sum()), slopes_S=scores.slopes_P2.flatten(), rewards=rewards)


def _logps(losses_l: Tensor, compared: Compared) -> Tensor:
    """Log probability of each answer, fp64 [S] on the host."""
    return -torch.stack([answer.sum() for answer in losses_l.double().cpu().split(compared.num_labels)])

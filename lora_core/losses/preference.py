# pyright: basic
"""Preference losses over pairs of answers (DPO, IPO, ORPO, SimPO) and over single answers (KTO).

A loss is a function of the summed log-probabilities of the answers. The backward therefore only needs its slope at
each answer: the gradient is that of the cross-entropy with each label weighted by the slope. Computed on the host in
fp64, since the number of answers is small. Shape suffixes: P pairs, S single answers; a last dimension of 2 is
(chosen, rejected).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.config import ObjectiveConfig
from lora_core.packing.packed_batch import Compared

LEAST_DOUBT = 1e-12
"""Lower limit of 1 - e^m. An answer whose probability rounds to 1 in fp32 has no finite odds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Summed log-probabilities in nats of each answer, the same under the reference model, and the number of labels.

    `logps_P2` and `reference_P2` are fp64 [P, 2]. `reference_P2` is None if the objective needs no reference.
    """

    logps_P2: Tensor
    reference_P2: Tensor | None
    num_labels_P2: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """Scores of each pair: the loss [P], the rewards that the loss compares and d loss / d logps (both [P, 2])."""

    loss_P: Tensor
    rewards_P2: Tensor
    slopes_P2: Tensor


def score_pairs(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """Return loss and slopes of each pair for "dpo", "orpo" or "simpo"."""
    if objective.kind == "dpo":
        return _ipo(objective, answers) if objective.loss_type == "ipo" else _dpo(objective, answers)
    return _orpo(objective, answers) if objective.kind == "orpo" else _simpo(objective, answers)


def _dpo(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(z), z the difference of the rewards β · log(π / π_ref).

    With label smoothing ε: -(1 - ε) log sigmoid(z) - ε log sigmoid(-z), which assumes that a fraction ε of the pairs
    is swapped.
    """
    assert answers.reference_P2 is not None
    rewards_P2 = objective.beta * (answers.logps_P2 - answers.reference_P2)
    loss_P, slope_P = _log_loss(rewards_P2[:, 0] - rewards_P2[:, 1], smoothing=objective.label_smoothing)
    return PairScores(loss_P=loss_P, rewards_P2=rewards_P2, slopes_P2=_opposed(objective.beta * slope_P))


def _ipo(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """IPO (arXiv 2310.12036, equation 17): (h - 1 / 2β)², h the difference of log(π / π_ref).

    As in TRL, log ratios are means over an answer's labels, so that the effect of β does not depend on the length.
    """
    assert answers.reference_P2 is not None
    ratios_P2 = (answers.logps_P2 - answers.reference_P2) / answers.num_labels_P2
    short_P = ratios_P2[:, 0] - ratios_P2[:, 1] - 1 / (2 * objective.beta)
    slopes_P2 = _opposed(2 * short_P) / answers.num_labels_P2
    return PairScores(loss_P=short_P.square(), rewards_P2=objective.beta * ratios_P2, slopes_P2=slopes_P2)


def _orpo(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """ORPO (arXiv 2403.07691, equations 6 and 7): -m_chosen - β log sigmoid(log odds ratio), odds = e^m / (1 - e^m).

    m is the mean log-probability of an answer. β is λ in the paper. docs/internals/engine.md explains the
    difference from TRL.
    """
    means_P2 = answers.logps_P2 / answers.num_labels_P2
    rest_P2 = -torch.expm1(means_P2).clamp_(max=-LEAST_DOUBT)  # 1 - e^m
    log_odds_P2 = means_P2 - rest_P2.log()
    loss_P, slope_P = _log_loss(log_odds_P2[:, 0] - log_odds_P2[:, 1])
    slopes_P2 = objective.beta * _opposed(slope_P) / rest_P2
    slopes_P2[:, 0] -= 1
    return PairScores(
        loss_P=objective.beta * loss_P - means_P2[:, 0],
        rewards_P2=objective.beta * means_P2,
        slopes_P2=slopes_P2 / answers.num_labels_P2,
    )


def _simpo(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """SimPO (arXiv 2405.14734, equation 6): -log sigmoid(β m_chosen - β m_rejected - gamma).

    m is the mean log-probability of an answer.
    """
    rewards_P2 = objective.beta * answers.logps_P2 / answers.num_labels_P2
    loss_P, slope_P = _log_loss(rewards_P2[:, 0] - rewards_P2[:, 1] - objective.gamma)
    slopes_P2 = objective.beta * _opposed(slope_P) / answers.num_labels_P2
    return PairScores(loss_P=loss_P, rewards_P2=rewards_P2, slopes_P2=slopes_P2)


def _log_loss(z_P: Tensor, *, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return -(1 - ε) log sigmoid(z) - ε log sigmoid(-z) and its derivative sigmoid(z) - 1 + ε."""
    loss_P = -(1 - smoothing) * F.logsigmoid(z_P) - smoothing * F.logsigmoid(-z_P)
    return loss_P, smoothing * torch.sigmoid(z_P) - (1 - smoothing) * torch.sigmoid(-z_P)


def _opposed(slope_P: Tensor) -> Tensor:
    """Return the slopes of both answers [P, 2] for the slope of their difference."""
    return torch.stack([slope_P, -slope_P], dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleAnswers:
    """Single answers of KTO.

    `ratios_S` is log(π / π_ref) of each answer, summed over its labels, fp64 [S]. `desirable_S` is bool [S].
    `reference_point` is z0 in nats, at least 0.
    """

    ratios_S: Tensor
    desirable_S: Tensor
    reference_point: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleScores:
    """Scores of each answer: the loss, the reward β · log(π / π_ref) and d loss / d log π, all fp64 [S].

    `is_gain_S` (bool [S]) is whether the log ratio is on the side of the reference point that its label asks for.
    """

    loss_S: Tensor
    rewards_S: Tensor
    slopes_S: Tensor
    is_gain_S: Tensor


def score_single(objective: ObjectiveConfig, answers: SingleAnswers) -> SingleScores:
    """KTO (arXiv 2402.01306, equation 8): λ - λ · sigmoid(β · (r - z0)), r the log ratio.

    For undesirable answers it is sigmoid(β · (z0 - r)). λ is `desirable_weight` or `undesirable_weight`.
    """
    is_good_S = answers.desirable_S.double()
    sign_S = 2 * is_good_S - 1
    weight_S = objective.desirable_weight * is_good_S + objective.undesirable_weight * (1 - is_good_S)
    gain_S = sign_S * objective.beta * (answers.ratios_S - answers.reference_point)
    loss_S = weight_S * torch.sigmoid(-gain_S)
    return SingleScores(
        loss_S=loss_S,
        rewards_S=objective.beta * answers.ratios_S,
        slopes_S=-objective.beta * sign_S * torch.sigmoid(gain_S) * loss_S,
        is_gain_S=gain_S > 0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSums:
    """Sums of rewards over the chosen and over the rejected answers of a slice.

    `num_ordered` is the number of pairs whose chosen answer has the higher reward. For single answers the sums are
    over desirable and over undesirable ones, and `num_ordered` counts those on the correct side of the reference point.
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
    """`slopes_S` is d loss / d log-probability of each answer, fp64 [S] on the host.

    While KTO measures its reference point, `loss_sum` is the sum of log ratios, `slopes_S` is 0 and `rewards` is None.
    """

    loss_sum: float
    slopes_S: Tensor
    rewards: RewardSums | None


def score_answers(compared: Compared, losses_l: Tensor, reference_l: Tensor | None) -> AnswerScores:
    """Score the answers of a segment from the cross-entropy of each label, fp64 [l] on the host.

    `reference_l` is the same under the reference model.
    """
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
    """Return the log-probability of each answer, fp64 [S]."""
    return -torch.stack([answer.sum() for answer in losses_l.split(compared.num_labels)])

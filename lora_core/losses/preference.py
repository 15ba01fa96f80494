# pyright: basic
"""Losses over pairs of answers to one prompt: how much better than the rejected the chosen one must be.

Letters: P pairs of a slice; a last dimension of 2 is (chosen, rejected). A loss is a function of the summed log
probabilities of the two answers, so its slopes are all that the backward needs: the gradient is that of
cross-entropy, each label weighted by the slope of its answer. On the host and in fp64: P is small.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.config import ObjectiveConfig

LEAST_DOUBT = 1e-12
"""1 - e^m is held above it: an answer that fp32 calls certain has no finite odds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Of each answer: the sum of its labels' log probabilities in nats, the base's own sum, its labels' number.

    `logps_P2` and `reference_P2` fp64 [P, 2]; the reference is None where the objective needs none.
    """

    logps_P2: Tensor
    reference_P2: Tensor | None
    num_labels_P2: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """Of each pair: its loss [P], the rewards that the loss compares, and d loss / d logps (both [P, 2])."""

    loss_P: Tensor
    rewards_P2: Tensor
    slopes_P2: Tensor


def score_pairs(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """The loss of each pair, with its slopes. `objective` is one of preference."""
    if objective.kind == "dpo":
        return _ipo(objective, answers) if objective.loss_type == "ipo" else _dpo(objective, answers)
    return _orpo(objective, answers) if objective.kind == "orpo" else _simpo(objective, answers)


def _dpo(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """-log sigmoid(z), z the difference of rewards β · log(π / π_ref) (arXiv 2305.18290, equation 7).

    With label smoothing ε: -(1 - ε) log sigmoid(z) - ε log sigmoid(-z), for labels of which a part ε is swapped.
    """
    assert answers.reference_P2 is not None
    rewards_P2 = objective.beta * (answers.logps_P2 - answers.reference_P2)
    loss_P, slope_P = _log_loss(rewards_P2[:, 0] - rewards_P2[:, 1], smoothing=objective.label_smoothing)
    return PairScores(loss_P=loss_P, rewards_P2=rewards_P2, slopes_P2=_opposed(objective.beta * slope_P))


def _ipo(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """(h - 1 / 2β)², h the difference of log(π / π_ref) (arXiv 2310.12036, equation 17).

    As in TRL, log ratios are means over an answer's labels, so that β means the same at any length.
    """
    assert answers.reference_P2 is not None
    ratios_P2 = (answers.logps_P2 - answers.reference_P2) / answers.num_labels_P2
    short_P = ratios_P2[:, 0] - ratios_P2[:, 1] - 1 / (2 * objective.beta)
    slopes_P2 = _opposed(2 * short_P) / answers.num_labels_P2
    return PairScores(loss_P=short_P.square(), rewards_P2=objective.beta * ratios_P2, slopes_P2=slopes_P2)


def _orpo(objective: ObjectiveConfig, answers: Answers) -> PairScores:
    """-m_chosen - β log sigmoid(log odds ratio), odds = e^m / (1 - e^m), m an answer's mean log probability.

    arXiv 2403.07691, equations 6 and 7; β is the paper's λ.
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
    """-log sigmoid(β m_chosen - β m_rejected - gamma), m an answer's mean log probability.

    arXiv 2405.14734, equation 6.
    """
    rewards_P2 = objective.beta * answers.logps_P2 / answers.num_labels_P2
    loss_P, slope_P = _log_loss(rewards_P2[:, 0] - rewards_P2[:, 1] - objective.gamma)
    slopes_P2 = objective.beta * _opposed(slope_P) / answers.num_labels_P2
    return PairScores(loss_P=loss_P, rewards_P2=rewards_P2, slopes_P2=slopes_P2)


def _log_loss(z_P: Tensor, *, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """-(1 - ε) log sigmoid(z) - ε log sigmoid(-z), and its derivative sigmoid(z) - 1 + ε."""
    loss_P = -(1 - smoothing) * F.logsigmoid(z_P) - smoothing * F.logsigmoid(-z_P)
    return loss_P, smoothing * torch.sigmoid(z_P) - (1 - smoothing) * torch.sigmoid(-z_P)


def _opposed(slope_P: Tensor) -> Tensor:
    """What raises the one answer lowers the other."""
    return torch.stack([slope_P, -slope_P], dim=-1)

# pyright: basic
"""The loss of single answers that were called desirable or not (KTO, arXiv 2402.01306): how much is gained by each.

Letters: S answers. As in preference.py a loss is a function of log probabilities, and its slopes are all that the
backward needs. On the host and in fp64. No gradient flows through the reference point (section 4.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.config import ObjectiveConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleAnswers:
    """`ratios_S` fp64 [S]: log(π / π_ref) of each answer, summed over its labels; `desirable_S` bool [S];
    `reference_point`: z0 in nats, not below 0."""

    ratios_S: Tensor
    desirable_S: Tensor
    reference_point: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleScores:
    """Of each answer: its loss, its reward β · log(π / π_ref), d loss / d log π, and whether it lies on the side of
    the reference point on which it was called to be."""

    loss_S: Tensor
    rewards_S: Tensor
    slopes_S: Tensor
    is_gain_S: Tensor


def score_single(objective: ObjectiveConfig, answers: SingleAnswers) -> SingleScores:
    """λ - λ · sigmoid(β · (r - z0)), r the log ratio; of undesirable answers sigmoid(β · (z0 - r)) (equation 8).

    λ is `desirable_weight` or `undesirable_weight`.
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

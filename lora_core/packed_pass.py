# pyright: basic
"""One pass of a pack through the base model: forward, and backward when it trains.

Letters: T tokens, L labels, D features.
"""

import torch
from torch import Tensor

from lora_core.base_model import BaseModel
from lora_core.job import SliceScores
from lora_core.objectives import score_labels, weighted_loss
from lora_core.pack import Pack, running


def hidden_states(base: BaseModel, pack: Pack) -> Tensor:
    """The last hidden states [T, D], with each segment's adapter at work."""
    with running(pack):
        output = base.model.base_model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False)
    return output.last_hidden_state[0]


def run_training(base: BaseModel, pack: Pack) -> list[SliceScores]:
    """Forward and backward: gradients are added to the rows, the scores of each segment returned.

    The loss is a sum over disjoint adapters on a frozen base, so each row receives its own gradient exactly.
    """
    with torch.enable_grad():
        h_LD = hidden_states(base, pack)[pack.label_positions_L]
        loss, scores = weighted_loss(h_LD, base.head(), pack.labels_L, pack.label_weights_L)
        loss.backward()
    return _by_segment(pack, scores.losses_L, scores.correct_L)


@torch.no_grad()
def run_evaluation(base: BaseModel, pack: Pack) -> list[SliceScores]:
    """Forward only."""
    h_LD = hidden_states(base, pack)[pack.label_positions_L]
    scores = score_labels(h_LD, base.head(), pack.labels_L)
    return _by_segment(pack, scores.losses_L, scores.correct_L)


def _by_segment(pack: Pack, losses_L: Tensor, correct_L: Tensor) -> list[SliceScores]:
    losses, correct = losses_L.double().cpu(), correct_L.cpu()
    return [
        SliceScores(
            loss_sum=float(losses[segment.label_start : segment.label_stop].sum()),
            num_correct=int(correct[segment.label_start : segment.label_stop].sum()),
        )
        for segment in pack.segments
    ]

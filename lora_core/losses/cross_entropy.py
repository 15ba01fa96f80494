# pyright: basic
"""Cross-entropy of labels from their logits, and the gradient with respect to the logits.

Where the device has kernels (lora_core/kernels/on_device.py), they work in place. Elsewhere torch computes it with fp32
copies. It avoids log_softmax, which took ten times as long as exp and a sum on a CPU. Shape suffixes: C labels, V
classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.kernels.on_device import has_kernels, kernels_of, memory_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRows:
    """Scores of each label: cross-entropy in nats (fp32 [C]), and whether no logit exceeds its own (bool [C]).

    `largest_C` is the largest logit of each row in fp32. `sums_C` is the sum of e^(logit - largest) over the row.
    """

    losses_C: Tensor
    correct_C: Tensor
    logits_CV: Tensor
    labels_C: Tensor
    smoothing_C: Tensor | None
    largest_C: Tensor
    sums_C: Tensor

    def gradient(self, weights_C: Tensor) -> Tensor:
        """Return weight · (softmax - (1 - ε) onehot - ε / V) in the logits' dtype. May overwrite the logits."""
        if not has_kernels(self.logits_CV):
            return self._gradient_by_torch(weights_C)
        tensors = (
            self.logits_CV,
            self.labels_C,
            weights_C,
            _smoothing(self.smoothing_C, self.labels_C),
            self.largest_C,
            self.sums_C,
        )
        kernels_of(self.logits_CV).logit_gradient(*map(memory_of, tensors))
        return self.logits_CV

    def _gradient_by_torch(self, weights_C: Tensor) -> Tensor:
        powers_CV = self.logits_CV.float().sub_(self.largest_C[:, None]).exp_()
        gradient_CV = powers_CV.mul_((weights_C / self.sums_C)[:, None])
        of_labels_C = weights_C
        if self.smoothing_C is not None:
            gradient_CV -= (weights_C * self.smoothing_C / gradient_CV.shape[1])[:, None]
            of_labels_C = weights_C * (1 - self.smoothing_C)
        places_C = torch.arange(len(of_labels_C), device=of_labels_C.device)
        gradient_CV[places_C, self.labels_C] -= of_labels_C
        return gradient_CV.to(self.logits_CV.dtype)


def score_rows(logits_CV: Tensor, labels_C: Tensor, smoothing_C: Tensor | None) -> ScoredRows:
    """Score each label. `smoothing_C` is its ε (label smoothing). With ε = 0 the bits equal those without smoothing."""
    if not has_kernels(logits_CV):
        return _score_by_torch(logits_CV, labels_C, smoothing_C)
    losses_C, largest_C, sums_C = torch.empty(3, len(labels_C), device=labels_C.device).unbind()
    correct_C = torch.empty(len(labels_C), dtype=torch.bool, device=labels_C.device)
    tensors = logits_CV, labels_C, _smoothing(smoothing_C, labels_C), losses_C, correct_C, largest_C, sums_C
    kernels_of(logits_CV).score_logits(*map(memory_of, tensors))
    return ScoredRows(
        losses_C=losses_C,
        correct_C=correct_C,
        logits_CV=logits_CV,
        labels_C=labels_C,
        smoothing_C=smoothing_C,
        largest_C=largest_C,
        sums_C=sums_C,
    )


def _score_by_torch(logits_CV: Tensor, labels_C: Tensor, smoothing_C: Tensor | None) -> ScoredRows:
    wide_CV = logits_CV.float()
    largest_C = wide_CV.amax(dim=-1)
    own_C = wide_CV.gather(1, labels_C[:, None])[:, 0]
    correct_C = own_C >= largest_C
    if smoothing_C is not None:
        mixed_C = (1 - smoothing_C) * own_C + smoothing_C * wide_CV.mean(dim=-1)
        own_C = torch.where(smoothing_C > 0, mixed_C, own_C)
    is_copy = logits_CV.dtype != torch.float32
    shifted_CV = wide_CV.sub_(largest_C[:, None]) if is_copy else wide_CV - largest_C[:, None]
    sums_C = shifted_CV.exp_().sum(dim=-1)
    return ScoredRows(
        losses_C=sums_C.log() + largest_C - own_C,
        correct_C=correct_C,
        logits_CV=logits_CV,
        labels_C=labels_C,
        smoothing_C=smoothing_C,
        largest_C=largest_C,
        sums_C=sums_C,
    )


def _smoothing(smoothing_C: Tensor | None, labels_C: Tensor) -> Tensor:
    """Return the smoothing as the kernels take it: empty without any."""
    return torch.empty(0, device=labels_C.device) if smoothing_C is None else smoothing_C

# pyright: basic
"""Cross-entropy through the output head at labels only. The forward also computes the gradient.

Logits exist for one chunk of labels at a time, which bounds memory: a chunk takes 8 bytes for each of CHUNK_LABELS ·
V logits, as catalog/resources/memory.py counts it. Shape suffixes: L labels of the pack, C labels of
a chunk, D features, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import batch_invariant
from lora_core.kernels.batch_invariant import ExactProducts
from lora_core.kernels.on_device import has_kernels, on_gpu
from lora_core.losses.cross_entropy import score_rows

CHUNK_LABELS = 256
GPU_CHUNK_LABELS = 1024
"""Labels of a chunk where kernels overwrite plain bf16 logits, which take as many bytes as 256 labels otherwise."""
LABEL_MULTIPLE = 32  # pads the last chunk so that exp and tanh use vector code for every element, whatever V is


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """An output head: logits = softcap · tanh(z / softcap) with z = multiplier · (h Wᵀ + b).

    `exact` enables batch-invariant matmuls (lora_core/kernels/batch_invariant.py).
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    multiplier: float = 1.0
    softcap: float | None = None
    exact: ExactProducts | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the logits are the product h Wᵀ + b without scaling or capping."""
        return self.multiplier == 1.0 and self.softcap is None

    def logits(self, h_CD: Tensor, num_used: int | None = None) -> Tensor:
        """Return the logits [C, V] in the base model's dtype, as transformers computes them.

        Rows from `num_used` on are padding.
        """
        z_CV = self.product(h_CD, num_used)
        if self.multiplier != 1.0:
            z_CV = z_CV * self.multiplier
        if self.softcap is not None:  # each name for one tensor, so that only two exist at a time
            z_CV = z_CV / self.softcap
            z_CV = torch.tanh(z_CV)
            z_CV = z_CV * self.softcap
        return z_CV

    def product(self, h_CD: Tensor, num_used: int | None = None) -> Tensor:
        return batch_invariant.linear(h_CD, self.weight_VD, self.bias_V, self.exact, num_used)

    def capping_slope(self, logits_CV: Tensor) -> Tensor | None:
        """Return the derivative of capping at these logits, 1 - tanh², [C, V]. None without capping."""
        return None if self.softcap is None else (logits_CV / self.softcap).square_().neg_().add_(1)

    def input_gradient(self, dlogits_CV: Tensor, h_CD: Tensor) -> Tensor:
        """Return dh [C, D] for the gradient before capping, which is overwritten. It is fp32 if logits were scaled."""
        if self.multiplier != 1.0:
            dlogits_CV.mul_(self.multiplier)
        return self.product_gradient(dlogits_CV.to(self.weight_VD.dtype), h_CD)

    def product_gradient(self, dz_CV: Tensor, _h_CD: Tensor) -> Tensor:
        """Return dh [C, D] of `product`. A trained head overrides this to accumulate its own gradient as well.

        It may overwrite the gradient dz.
        """
        return batch_invariant.times(dz_CV, self.weight_VD, self.exact)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """Scores of each label: cross-entropy in nats (fp32 [L]), and whether no other token was likelier (bool [L])."""

    losses_L: Tensor
    correct_L: Tensor


def score_labels(h_LD: Tensor, head: Head, labels_L: Tensor) -> TokenScores:
    """Return the scores without a gradient, for evaluation."""
    scores, _ = _score(h_LD.detach(), head, labels_L, None)
    return scores


def weighted_loss(
    h_LD: Tensor, head: Head, labels_L: Tensor, weights_L: Tensor, smoothing_L: Tensor | None = None
) -> tuple[Tensor, TokenScores]:
    """Return Σ weight · cross-entropy, which is differentiable in h, and the scores of each label.

    `smoothing_L` is the ε of each label, as label_smoothing in torch.nn.functional.cross_entropy: the label has the
    target probability 1 - ε, and ε is spread evenly over the vocabulary.
    """
    loss, losses_L, correct_L = ChunkedCrossEntropy.apply(h_LD, head, labels_L, (weights_L, smoothing_L))
    return loss, TokenScores(losses_L=losses_L, correct_L=correct_L)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_LD: Tensor, head: Head, labels_L: Tensor, of_labels: tuple[Tensor, Tensor | None]):
        weights_L, smoothing_L = of_labels
        scores, ctx.dh_LD = _score(h_LD, head, labels_L, weights_L, smoothing_L)
        ctx.mark_non_differentiable(scores.losses_L, scores.correct_L)
        return scores.losses_L.dot(weights_L), scores.losses_L, scores.correct_L

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        return ctx.dh_LD * grad_outputs[0], None, None, None


def _score(
    h_LD: Tensor, head: Head, labels_L: Tensor, weights_L: Tensor | None, smoothing_L: Tensor | None = None
) -> tuple[TokenScores, Tensor | None]:
    """Return the scores and, if weights are given, the gradient [L, D]. Padding rows are removed again."""
    num_labels = len(labels_L)
    filler = -num_labels % LABEL_MULTIPLE
    h_LD, labels_L = F.pad(h_LD, (0, 0, 0, filler)), F.pad(labels_L, (0, filler))
    weights_L = F.pad(weights_L, (0, filler)) if weights_L is not None else None
    smoothing_L = F.pad(smoothing_L, (0, filler)) if smoothing_L is not None else None
    losses, correct, gradients = [], [], []
    is_in_place = head.is_plain and on_gpu(h_LD) and has_kernels(h_LD)
    step = GPU_CHUNK_LABELS * 2 // h_LD.element_size() if is_in_place else CHUNK_LABELS
    for start in range(0, num_labels, step):
        chunk = slice(start, start + step)
        smoothing_C = None if smoothing_L is None else smoothing_L[chunk]
        logits_CV = head.logits(h_LD[chunk]) if head.is_plain else head.logits(h_LD[chunk]).float()
        scored = score_rows(logits_CV, labels_L[chunk], smoothing_C)
        losses.append(scored.losses_C)
        correct.append(scored.correct_C)
        if weights_L is not None:
            slope_CV = head.capping_slope(logits_CV)  # before the gradient overwrites the logits
            dlogits_CV = scored.gradient(weights_L[chunk])
            if slope_CV is not None:
                dlogits_CV.mul_(slope_CV)
            del slope_CV
            gradients.append(head.input_gradient(dlogits_CV, h_LD[chunk]))
            del dlogits_CV
        del logits_CV, scored  # before the next chunk's logits are allocated
    scores = TokenScores(losses_L=torch.cat(losses)[:num_labels], correct_L=torch.cat(correct)[:num_labels])
    return scores, torch.cat(gradients)[:num_labels] if gradients else None

"""The chunked loss and its gradient equal cross-entropy, for every kind of output head."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catalog.resources.memory import BaseModelMemory
from lora_core.losses import chunked_cross_entropy
from lora_core.losses import cross_entropy as label_scores
from lora_core.losses.chunked_cross_entropy import CHUNK_LABELS, GPU_CHUNK_LABELS, Head, score_labels, weighted_loss

L, D, V = 45, 8, 50


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"multiplier": 0.25}, {"multiplier": 2.0, "softcap": 5.0}])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_scores_and_gradient_equal_torch_cross_entropy(monkeypatch, options, bias):
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK_LABELS", 16)
    torch.manual_seed(0)
    head = Head(weight_VD=torch.randn(V, D), bias_V=torch.randn(V) if bias else None, **options)
    labels, weights = torch.randint(V, (L,)), torch.rand(L)
    h = torch.randn(L, D, requires_grad=True)

    loss, scores = weighted_loss(h, head, labels, weights)
    (3 * loss).backward()

    reference = h.detach().clone().requires_grad_()
    logits = head.logits(reference)
    expected = F.cross_entropy(logits, labels, reduction="none")
    (3 * expected @ weights).backward()
    torch.testing.assert_close(scores.losses_L, expected.detach())
    torch.testing.assert_close(h.grad, reference.grad)
    assert torch.equal(scores.correct_L, logits.argmax(-1) == labels)
    assert torch.equal(score_labels(h, head, labels).losses_L, scores.losses_L)


@pytest.mark.parametrize("options", [{}, {"multiplier": 2.0, "softcap": 5.0}])
def test_label_smoothing_equals_torch_and_keeps_the_bits_of_other_labels(monkeypatch, options):
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK_LABELS", 16)
    torch.manual_seed(0)
    head = Head(weight_VD=torch.randn(V, D), bias_V=None, **options)
    labels, weights = torch.randint(V, (L,)), torch.rand(L)
    h = torch.randn(L, D, requires_grad=True)
    plain = h.detach().clone().requires_grad_()
    smoothing = torch.where(torch.arange(L) % 3 == 0, 0.2, 0.0)
    is_smooth = smoothing > 0

    loss, scores = weighted_loss(h, head, labels, weights, smoothing)
    loss.backward()

    reference = h.detach().clone().requires_grad_()
    logits = head.logits(reference)
    expected = F.cross_entropy(logits, labels, reduction="none")
    smoothed = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    expected = torch.where(is_smooth, smoothed, expected)
    (expected @ weights).backward()
    torch.testing.assert_close(scores.losses_L, expected.detach())
    torch.testing.assert_close(h.grad, reference.grad)
    unsmoothed, plain_scores = weighted_loss(plain, head, labels, weights)
    unsmoothed.backward()
    assert torch.equal(scores.losses_L[~is_smooth], plain_scores.losses_L[~is_smooth])
    assert h.grad is not None
    assert plain.grad is not None
    assert torch.equal(h.grad[~is_smooth], plain.grad[~is_smooth])


def test_no_bit_depends_on_the_neighbors_of_a_label():
    torch.manual_seed(0)
    head = Head(weight_VD=torch.randn(V, 64), bias_V=None, softcap=3.0)
    h, labels = torch.randn(300, 64), torch.randint(V, (300,))

    whole = score_labels(h, head, labels).losses_L

    for start, stop in [(0, 1), (7, 24), (255, 300)]:
        assert torch.equal(score_labels(h[start:stop], head, labels[start:stop]).losses_L, whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_kernels_and_torch_give_the_same_scores_and_gradients(monkeypatch, dtype, smoothed):
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(32, 700).mul_(4).to(dtype), torch.randint(700, (32,)), torch.rand(32)
    smoothing = torch.linspace(0, 0.3, 32) if smoothed else None
    by_kernels = label_scores.score_rows(logits.clone(), labels, smoothing)
    gradient = by_kernels.gradient(weights)

    monkeypatch.setattr(label_scores, "has_kernels", lambda _: False)
    by_torch = label_scores.score_rows(logits, labels, smoothing)

    torch.testing.assert_close(by_kernels.losses_C, by_torch.losses_C, rtol=1e-6, atol=2e-6)
    assert torch.equal(by_kernels.correct_C, by_torch.correct_C)
    rtol, atol = (1e-5, 1e-7) if dtype == torch.float32 else (0.008, 1e-6)
    torch.testing.assert_close(gradient, by_torch.gradient(weights), rtol=rtol, atol=atol)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_non_finite_logit_affects_only_the_loss_of_its_label(wrong):
    logits, labels = torch.zeros(32, 40, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.int64)
    logits[3, 7] = wrong

    losses = label_scores.score_rows(logits, labels, None).losses_C

    assert torch.isfinite(losses).tolist() == [row != 3 for row in range(32)]


class PeakMemory(TorchDispatchMode):
    """Measures the most bytes that the results of operators hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self._storages.values()))
        return found


@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"multiplier": 0.25}, {"multiplier": 2.0, "softcap": 5.0}])
def test_a_chunk_of_logits_takes_the_memory_that_is_counted(monkeypatch, options, dtype, has_kernels):
    if not has_kernels:
        monkeypatch.setattr(label_scores, "has_kernels", lambda _: False)
    num_classes, num_labels = 3000, 2 * CHUNK_LABELS
    head = Head(weight_VD=torch.ones(num_classes, D, dtype=dtype), bias_V=None, **options)
    labels, weights, smoothing = torch.arange(num_labels), torch.rand(num_labels), torch.full((num_labels,), 0.1)
    h = torch.randn(num_labels, D, dtype=dtype, requires_grad=True)

    with PeakMemory() as found:
        weighted_loss(h, head, labels, weights, smoothing)

    counted = BaseModelMemory({"vocab_size": num_classes}, "bfloat16").tick_parts(0)["logits"]
    others = head.weight_VD.nbytes + num_labels * (4 * D + 64)
    assert counted / 4 < found.peak_bytes <= counted + others


def test_a_chunk_of_a_gpu_takes_the_memory_that_is_counted():
    """There a kernel overwrites logits of bf16, and no other tensor has their size."""
    assert BaseModelMemory({"vocab_size": V}, "bfloat16").tick_parts(0)["logits"] == 2 * GPU_CHUNK_LABELS * V

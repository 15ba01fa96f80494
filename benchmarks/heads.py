"""Contenders for the output head with its loss: Lorry's and the plain one, with their peak memory.

Shape suffixes: L labels, D features, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gate import Gate
from benchmarks.memory import memory
from lora_core.losses.chunked_cross_entropy import Head, weighted_loss

PEAK_RESET = Path("/proc/self/clear_refs")


def chunked_head(gate: Gate, options: dict[str, Any]) -> None:
    h_LD, weight_VD, labels_L = inputs(options)
    head, weights_L = Head(weight_VD=weight_VD, bias_V=None), torch.full((len(labels_L),), 1 / len(labels_L))
    _measure(gate, h_LD, lambda: weighted_loss(h_LD, head, labels_L, weights_L)[0])


def plain_head(gate: Gate, options: dict[str, Any]) -> None:
    """Compute the loss as transformers does, with logits of all labels at once in fp32."""
    h_LD, weight_VD, labels_L = inputs(options)
    _measure(gate, h_LD, lambda: F.cross_entropy(F.linear(h_LD, weight_VD).float(), labels_L))


def inputs(options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    num_labels, num_features, vocab_size = options["num_labels"], options["num_features"], options["vocab_size"]
    dtype = getattr(torch, options["dtype"])
    h_LD = torch.randn(num_labels, num_features).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocab_size, num_features) * num_features**-0.5).to(dtype)
    return h_LD, weight_VD, torch.randint(vocab_size, (num_labels,))


def _measure(gate: Gate, h_LD: Tensor, compute: Any) -> None:
    """Run one forward and backward per step."""
    while True:
        gate.wait()
        _forget_peak()
        before = memory("VmRSS")
        loss = compute()
        loss.backward()
        gate.report(loss=float(loss), peak_bytes=memory("VmHWM") - before)
        del loss
        h_LD.grad = None


def _forget_peak() -> None:
    """Reset the kernel's record of the process's peak memory."""
    PEAK_RESET.write_text("5")

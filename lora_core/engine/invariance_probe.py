# pyright: basic
"""Tests at start, on the real base model, whether it can be packed and whether packmates change bits on this machine.

`refuse_mixing` rejects a model that does not keep the sequences of a pack apart. `measure_invariance` trains synthetic
jobs alone and together. The packs have at most 112 rows; batch_invariant.py tries each matmul of larger ticks.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import nn

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment, choose_targets
from lora_core.config import LoraConfig, ObjectiveConfig
from lora_core.errors import ANY_FAILURE, UnsupportedModel
from lora_core.forward.classification import placeholder_head
from lora_core.forward.language_model import run_training
from lora_core.layers.module_matching import kind_of
from lora_core.layers.task_heads import NUM_PLACEHOLDER_CLASSES
from lora_core.losses.preference import SliceScores
from lora_core.packing.packed_batch import SliceInput, build_pack
from lora_core.peft_format.export import PROBE_POSITIONS, packed_logits
from lora_core.runtime.counter_rng import random_words, uniform
from lora_core.runtime.cpu_lanes import Lanes, split
from lora_core.runtime.device_errors import is_device_fault, shortage_named

LOGGER = logging.getLogger(__name__)
Invariance = Literal["bitwise", "allclose"]
LENGTHS = ((19, 30), (9,), (41, 5, 7))  # sequences of three synthetic jobs, of odd sizes on purpose
RANKS = (4, 8, 3)
CLOSE = 0.3
"""Fraction of a norm by which `allclose` results may differ. Another summation order in bf16 changes a gradient of
SmolLM2's 30 blocks by 0.013, and rounding errors grow with depth. Mixed sequences change it by about 1."""
GRADED = ObjectiveConfig(kind="classification", num_labels=NUM_PLACEHOLDER_CLASSES)


def measure_invariance(base: BaseModel, lanes: Lanes) -> Invariance:
    """Train three synthetic jobs alone, together, and together in the opposite order, in lanes as in real ticks.

    Gradients that are equal bit for bit give "bitwise", and close ones "allclose". A model with other gradients is
    rejected: raises UnsupportedModel. Without batch-invariant matmuls, such as on a GPU, a matmul may use another order
    of summation in larger packs. With several threads per lane, an element-wise kernel may split a tensor among them by
    its size. Both are "allclose" even if these packs are equal.
    """
    refuse_mixing(base)
    packs = ((0,), (1,), (2,), (0, 1, 2), (2, 1, 0))

    def compute(numbers: list[int]) -> list[tuple[int, list[torch.Tensor]]]:
        """Return the number and the gradients of each pack. Every pack has adapters of its own."""
        return [
            (number, _gradients(base, [_synthetic_slice(base, job) for job in packs[number]])) for number in numbers
        ]

    parts = split([sum(sum(LENGTHS[job]) for job in pack) for pack in packs], num_lanes=lanes.count)
    found = dict(chain.from_iterable(lanes.run(compute, parts)))
    pairs = [
        (found[job][0], gradient)
        for number in (3, 4)
        for job, gradient in zip(packs[number], found[number], strict=True)
    ]
    is_exact = base.kernels.batch_invariant is not None and torch.get_num_threads() == 1
    if is_exact and all(torch.equal(one, other) for one, other in pairs):
        return "bitwise"
    difference = max(_difference(one, other) for one, other in pairs)
    LOGGER.info("Gradients of packed and solo jobs differ by up to %.2g of their norm.", difference)
    if difference <= CLOSE:
        return "allclose"
    raise _unpackable(base, "its gradients depend on the other jobs in the same pass")


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the difference as a fraction of the norm, the larger one of gradient and loss: the sum of losses is
    hundreds of times as large as a gradient's norm. Infinite if it is not a number."""
    parts = zip(one.split([len(one) - 1, 1]), other.split([len(one) - 1, 1]), strict=True)
    found = [
        0.0 if torch.equal(a, b) else float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a))
        for a, b in parts
    ]
    return max(math.inf if math.isnan(part) else part for part in found)


def representative_linears(attachment: Attachment) -> dict[str, nn.Module]:
    """Return the linears of the top blocks that represent all blocks, and the linears outside blocks.

    The number of blocks suffices to contain each kind of block above the lowest adapter, where gradients pass through.
    Two blocks are of the same kind if only their number differs. The forward pass still runs all blocks.
    """
    blocks = attachment.blocks
    kinds = [kind_of(block) for block in blocks.modules]
    lowest = min((len(kinds) - 1 - kinds[::-1].index(kind) for kind in set(kinds)), default=0) - 1
    return {
        name: linear
        for name, linear in attachment.linears.items()
        if not blocks.holds(name) or blocks.number_of(name) >= lowest
    }


def refuse_mixing(base: BaseModel) -> None:
    """Require that packed logits without adapters equal those of transformers, and don't depend on later tokens.

    The second check doesn't apply to sequence classifiers, because an encoder attends to all tokens. `base` must be
    attached. Raises UnsupportedModel with the name of the architecture.
    """
    ids = np.stack([_ids(base, "mixing", count=24)] * 2)
    ids[1, -1] = (ids[0, -1] + 1) % base.vocab_size
    with _failures_named(base, "the forward pass of transformers"):
        reference = _reference_logits(base, ids)
    with _failures_named(base, "a packed pass"):
        packed = _packed_logits(base, ids)
    if not torch.isfinite(reference).all():
        raise _unpackable(base, "its logits are not finite")
    limit = {torch.float32: 1e-3, torch.bfloat16: 0.1}[base.dtype] * float(reference.abs().max())
    if not float((packed - reference).abs().max()) <= limit:
        raise _unpackable(base, "its logits differ from those of transformers")
    if base.task == "causal-lm" and float((packed[0, 0] - packed[1, 0]).abs().max()) > limit:
        raise _unpackable(base, "its logits depend on later tokens")


def _reference_logits(base: BaseModel, ids: np.ndarray) -> torch.Tensor:
    with base.untouched() as model, torch.no_grad():
        rows = [torch.from_numpy(row.astype(np.int64))[None].to(base.device) for row in ids]
        if base.task == "causal-lm":
            logits = [model.forward(input_ids=row, use_cache=False).logits[:, -PROBE_POSITIONS:] for row in rows]
        else:
            logits = [model.forward(input_ids=row).logits[:, None] for row in rows]
    return torch.cat([row.float().cpu() for row in logits])


def _packed_logits(base: BaseModel, ids: np.ndarray) -> torch.Tensor:
    """Return the logits of packed sequences without an adapter."""
    bare = FlatAdapter(
        (), LoraConfig(rank=1, alpha=1), dtype=base.dtype, device=base.device, trained=placeholder_head(base)
    )
    bare.initialize(0)
    return packed_logits(base, bare, ids)


@contextmanager
def _failures_named(base: BaseModel, what: str) -> Iterator[None]:
    """Convert an arbitrary error of a model family, whose code wasn't written for packs, to UnsupportedModel."""
    try:
        with shortage_named():
            yield
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except ANY_FAILURE as error:
        if is_device_fault(error):
            raise
        raise _unpackable(base, f"{what} fails ({type(error).__name__}: {error})") from error


def _unpackable(base: BaseModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(base.model).__name__} can't be packed: {reason}.",
        remedy="Choose a decoder that uses transformers' attention interface.",
    )


def _synthetic_slice(base: BaseModel, index: int) -> SliceInput:
    assert base.attachment is not None
    lora = LoraConfig(rank=RANKS[index], alpha=8)
    targets = choose_targets(representative_linears(base.attachment), lora)
    adapter = FlatAdapter(targets, lora, dtype=base.dtype, device=base.device, trained=placeholder_head(base))
    numbers = uniform("invariance", index, count=adapter.num_parameters) - 0.5
    adapter.p.copy_(torch.from_numpy(numbers.astype(np.float32) * 0.05))
    adapter.refresh_compute()
    sequences = []
    for length in LENGTHS[index]:
        mask = np.ones(length, np.uint8)
        mask[0] = 0
        sequences.append((_ids(base, "invariance", index, length, count=length), mask))
    num_labels = sum(length - 1 for length in LENGTHS[index])
    if base.task != "causal-lm":
        num_labels = len(sequences)
    return SliceInput(
        adapter=adapter,
        sequences=tuple(sequences),
        label_weight=1 / num_labels,
        dropout=None,
        objective=ObjectiveConfig() if base.task == "causal-lm" else GRADED,
        labels=(1.0,) * len(sequences),
    )


def _ids(base: BaseModel, *key: int | str, count: int) -> np.ndarray:
    return (random_words(*key, count=count) % np.uint64(base.vocab_size)).astype(np.int32)


def _gradients(base: BaseModel, slices: list[SliceInput]) -> list[torch.Tensor]:
    scores: list[SliceScores] = run_training(base, build_pack(slices, device=base.device))
    gradients = [
        torch.cat([part.adapter.g.cpu(), torch.tensor([score.loss_sum])])
        for part, score in zip(slices, scores, strict=True)
    ]
    for part in slices:
        part.adapter.g.zero_()
    return gradients

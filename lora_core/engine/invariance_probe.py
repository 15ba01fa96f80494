# pyright: basic
"""Asks the kernels of this machine, at start-up: does a job's gradient depend on its packmates?

Whether it is the same bit for bit is a property of kernels, sizes and thread counts, so it is measured on the
real base model. A model that isn't even close doesn't keep packed sequences apart, and is refused. The packs are small;
what speaks for ticks of any size is that products are tried at each number of rows
(lora_core/kernels/batch_invariant.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import nn

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment, choose_targets
from lora_core.config import LoraConfig, ObjectiveConfig
from lora_core.engine.cpu_lanes import Lanes, split
from lora_core.errors import ANY_FAILURE, UnsupportedModel
from lora_core.forward.classification import placeholder_head
from lora_core.forward.language_model import run_training
from lora_core.layers.module_matching import kind_of
from lora_core.layers.task_heads import NUM_PLACEHOLDER_CLASSES
from lora_core.losses.preference import SliceScores
from lora_core.packing.packed_batch import SliceInput, build_pack
from lora_core.peft_format.export import PROBE_POSITIONS, packed_logits
from lora_core.runtime.counter_rng import random_words, uniform
from lora_core.runtime.device_errors import is_device_fault, shortage_named

Invariance = Literal["bitwise", "allclose"]
LENGTHS = ((19, 30), (9,), (41, 5, 7))  # sequences of three synthetic jobs, of odd sizes on purpose
RANKS = (4, 8, 3)
CLOSE = 0.1
"""Share of a norm by which `allclose` results may differ. Another order of sums in bf16 changes a gradient of
SmolLM2's 30 blocks by 0.013, and rounding grows with depth."""
GRADED = ObjectiveConfig(kind="classification", num_labels=NUM_PLACEHOLDER_CLASSES)


def measure_invariance(base: BaseModel, lanes: Lanes) -> Invariance:
    """Train three synthetic jobs alone, then packed in two orders, and compare; in lanes, as ticks are computed.

    Without exact products, as on any GPU, the word is `allclose` at most: the largest pack has 112 rows, and a product
    may sum in another order at any number of rows above. So it is with several threads to a lane: an element-wise
    kernel may divide a tensor among them by its size. Raises UnsupportedModel.
    """
    refuse_mixing(base)
    orders = ((0,), (1,), (2,), (0, 1, 2), (2, 1, 0))
    found = _train_each(base, orders, lanes)
    alone = [found[order][0] for order in orders[:3]]
    pairs = [
        (alone[index], gradient) for order in orders[3:] for index, gradient in zip(order, found[order], strict=True)
    ]
    is_exact = base.kernels.batch_invariant is not None and torch.get_num_threads() == 1
    if is_exact and all(torch.equal(one, other) for one, other in pairs):
        return "bitwise"
    if all(_is_close(one, other) for one, other in pairs):
        return "allclose"
    raise _unpackable(base, "its gradients change with the packmates")


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The gradient, and the loss behind it, each by itself: a sum of losses is hundreds of times a gradient's norm."""
    parts = zip(one.split([len(one) - 1, 1]), other.split([len(one) - 1, 1]), strict=True)
    return all(torch.linalg.vector_norm(a - b) <= CLOSE * torch.linalg.vector_norm(a) for a, b in parts)


def _train_each(
    base: BaseModel, orders: tuple[tuple[int, ...], ...], lanes: Lanes
) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """The gradients of the jobs of each pack, in its order. Every pack has rows of its own."""
    sizes = [sum(sum(LENGTHS[index]) for index in order) for order in orders]

    def compute(lane: list[int]) -> list[list[torch.Tensor]]:
        packs = [orders[number] for number in lane]
        return [_gradients(base, [_synthetic_slice(base, index) for index in order]) for order in packs]

    parts = split(sizes, num_tokens=sum(sizes), num_lanes=lanes.count)
    found = zip(parts, lanes.run(compute, parts), strict=True)
    return {orders[number]: gradients for lane, done in found for number, gradients in zip(lane, done, strict=True)}


def representative_linears(attachment: Attachment) -> dict[str, nn.Module]:
    """Those of the top blocks that stand for all: one more than hold each kind of block, so that each kind has one
    above the lowest adapter, through which gradients pass on; and those of no block.

    Every pass goes forward through all blocks all the same. Blocks are of a kind where nothing but their number
    tells them apart.
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
    """Packed logits without adapters must be those of transformers, and not change with later tokens.

    A classifier of sequences is asked the first alone: an encoder sees all tokens from each.

    Raises UnsupportedModel, which names the architecture. `base` must be attached.
    """
    ids = np.stack([_ids(base, "mixing", count=24)] * 2)
    ids[1, -1] = (ids[0, -1] + 1) % base.vocab_size
    with _failures_named(base, "transformers' own pass"):
        reference = _reference_logits(base, ids)
    with _failures_named(base, "a packed pass"):
        packed = _packed_logits(base, ids)
    if not torch.isfinite(reference).all():
        raise _unpackable(base, "its logits are not finite")
    limit = {torch.float32: 1e-3, torch.bfloat16: 0.1}[base.dtype] * float(reference.abs().max())
    if not float((packed - reference).abs().max()) <= limit:
        raise _unpackable(base, "its logits differ from transformers' own")
    if base.task == "causal-lm" and float((packed[0, 0] - packed[1, 0]).abs().max()) > limit:
        raise _unpackable(base, "its logits change with later tokens")


def _reference_logits(base: BaseModel, ids: np.ndarray) -> torch.Tensor:
    with base.untouched() as model, torch.no_grad():
        rows = [torch.from_numpy(row.astype(np.int64))[None].to(base.device) for row in ids]
        if base.task == "causal-lm":
            logits = [model.forward(input_ids=row, use_cache=False).logits[:, -PROBE_POSITIONS:] for row in rows]
        else:
            logits = [model.forward(input_ids=row).logits[:, None] for row in rows]
    return torch.cat([row.float().cpu() for row in logits])


def _packed_logits(base: BaseModel, ids: np.ndarray) -> torch.Tensor:
    """Without an adapter."""
    bare = FlatAdapter(
        (), LoraConfig(rank=1, alpha=1), dtype=base.dtype, device=base.device, trained=placeholder_head(base)
    )
    bare.initialize(0)
    return packed_logits(base, bare, ids)


@contextmanager
def _failures_named(base: BaseModel, what: str) -> Iterator[None]:
    """A family may fail in any way, by its sizes or where the engine passes it by, so all are caught."""
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
        remedy="Choose a decoder whose attention follows transformers' attention interface.",
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

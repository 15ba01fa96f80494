# pyright: basic
"""Trials of the Triton kernels on a device, before an engine uses them. A kernel must give the reference's results.

Shape suffixes: T tokens, t tokens of a segment, D input features, O output features, R rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lora_core.kernels.gpu.tables import ENTRY, MOST_SIBLINGS, Member, class_of, group_of, tables_of
from lora_core.kernels.gpu.tiled_run import TiledRun
from lora_core.kernels.gpu.trial_failures import failure_of
from lora_core.kernels.gpu.trial_inputs import numbers
from lora_core.runtime.transfers import upload

AMPERE = (8, 0)
"""Minimum compute capability: earlier ones do not multiply bfloat16."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest difference, as a fraction of the reference's largest number."""
D, OUTPUTS = 272, (208, 80, 144)
"""Input features, and output features of siblings: more than one block of each kernel."""
NONE, SOME = (0, 0), (60_000, 30_000)
Tried = tuple[tuple[int, int], tuple[int, int]]
TRIED: tuple[Tried, ...] = (
    ((16, 8), NONE),
    ((12, 4), SOME),
    ((24, 32), NONE),
    ((20, 28), SOME),
    ((40, 64), NONE),
    ((36, 60), SOME),
    ((72, 128), NONE),
    ((100, 68), SOME),
)
"""Ranks of two segments of one class, and their thresholds of dropout. Each number of siblings is tried.

They use every variant of the kernels. A variant depends on the width, and for B on the alignment, for A on dropout.
"""
LOOP = "LoRA runs segment by segment"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSegment:
    """A segment with its random adapter. Without a threshold it has no dropout."""

    start: int
    stop: int
    a_RD: Tensor
    b_OR: Tensor
    grad_a_RD: Tensor
    grad_b_OR: Tensor
    scale: float
    threshold: int
    key: tuple[int, int]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keep_factor(self) -> float:
        return 65536 / self.threshold if self.threshold else 1.0

    def kept_tD(self) -> Tensor:
        """Return the factors of dropout."""
        like_tD = self.a_RD.new_ones(self.stop - self.start, self.a_RD.shape[1])
        if not self.threshold:
            return like_tD
        words = np.random.Philox(key=np.array(self.key, np.uint64)).random_raw(-(-like_tD.numel() // 4))
        flips = np.asarray(words, np.uint64).view(np.uint16)[: like_tD.numel()] < self.threshold
        return like_tD * torch.from_numpy(flips).view(like_tD.shape).to(like_tD) * self.keep_factor


def why_not_tiled(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels of segmented_lora.py can't be used on this CUDA device, or None."""
    capability = torch.cuda.get_device_capability(device)
    if dtype != torch.bfloat16:
        return f"{LOOP}: the kernels need bfloat16, but the base model has {dtype}"
    if capability < AMPERE:
        return f"{LOOP}: the kernels need compute capability 8.0, not {capability[0]}.{capability[1]}"
    return why_lora_differs(device, dtype)


@cache
def why_lora_differs(device: torch.device, dtype: torch.dtype, tried: tuple[Tried, ...] = TRIED) -> str | None:
    """Return how the kernels differ from the reference on this device, or None if they agree.

    Later calls read the result. Raises torch.AcceleratorError if the device can't be used any more.
    """
    try:
        for name, difference in _differences(device, dtype, tried):
            if not difference <= TOLERANCE[dtype]:
                return f"{LOOP}: {name} of the Triton kernels differs by {difference:.1e} of its largest number"
    except Exception as error:  # noqa: BLE001  (Triton's errors have no other base class)
        return f"{LOOP}: {failure_of(error, device)}"
    return None


def _differences(device: torch.device, dtype: torch.dtype, tried: tuple[Tried, ...]) -> Iterator[tuple[str, float]]:
    for ranks, thresholds in tried:
        for number in range(1, MOST_SIBLINGS + 1):
            siblings = [_segments(ranks, thresholds, outputs, device, dtype) for outputs in OUTPUTS[:number]]
            yield from _worst(siblings, device, dtype).items()


def _segments(
    ranks: Sequence[int], thresholds: Sequence[int], outputs: int, device: torch.device, dtype: torch.dtype
) -> list[TrialSegment]:
    """Return two segments of a linear, one of which has more rows than a tile."""
    bounds = ((0, 7), (7, 80))
    return [
        TrialSegment(
            start=start,
            stop=stop,
            a_RD=numbers((rank, D), 0, device).to(dtype),
            b_OR=numbers((outputs, rank), 0, device).to(dtype),
            grad_a_RD=torch.ones(rank, D, device=device),
            grad_b_OR=torch.ones(outputs, rank, device=device),
            scale=0.5 + index,
            threshold=threshold,
            key=(2**63 + index, outputs),
        )
        for index, ((start, stop), rank, threshold) in enumerate(zip(bounds, ranks, thresholds, strict=True))
    ]


def _worst(siblings: Sequence[Sequence[TrialSegment]], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the largest difference of each result over all siblings."""
    T = siblings[0][-1].stop
    x_TD = numbers((T, D), 0, device).to(dtype)
    gradients = [numbers((T, len(segments[0].b_OR)), 0, device).to(dtype) for segments in siblings]
    outputs, dx_TD = [dy_TO.clone() for dy_TO in gradients], x_TD.clone()
    wanted = [_expected(x_TD, dy_TO, segments) for dy_TO, segments in zip(gradients, siblings, strict=True)]
    run = run_of(siblings, device)
    h_tW = run.add(outputs, x_TD)
    run.add_gradients(dx_TD, gradients, x_TD, h_tW)
    expected_TD = x_TD.float() + torch.stack([part.dx_TD for part in wanted]).sum(0)
    worst = {"y": 0.0, "dx": _difference(dx_TD, expected_TD), "dA": 0.0, "dB": 0.0}
    for y_TO, segments, expected in zip(outputs, siblings, wanted, strict=True):
        worst["y"] = max(worst["y"], _difference(y_TO, expected.y_TO))
        for part, (da_RD, db_OR) in zip(segments, expected.gradients, strict=True):
            worst["dA"] = max(worst["dA"], _difference(part.grad_a_RD, da_RD))
            worst["dB"] = max(worst["dB"], _difference(part.grad_b_OR, db_OR))
    return worst


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedLora:
    """Results of one linear in fp32: y, its part of dx, and (dA, dB) of each segment, added to the ones before."""

    y_TO: Tensor
    dx_TD: Tensor
    gradients: list[tuple[Tensor, Tensor]]


def _expected(x_TD: Tensor, dy_TO: Tensor, segments: Sequence[TrialSegment]) -> ExpectedLora:
    expected = ExpectedLora(y_TO=dy_TO.float().clone(), dx_TD=torch.zeros_like(x_TD, dtype=torch.float32), gradients=[])
    for part in segments:
        a_RD, b_OR, kept_tD = part.a_RD.float(), part.b_OR.float(), part.kept_tD().float()
        d_tD, dy_tO = x_TD[part.rows].float() * kept_tD, dy_TO[part.rows].float()
        expected.y_TO[part.rows] += part.scale * d_tD @ a_RD.T @ b_OR.T
        expected.dx_TD[part.rows] += part.scale * (dy_tO @ b_OR @ a_RD) * kept_tD
        da_RD, db_OR = part.scale * (dy_tO @ b_OR).T @ d_tD, part.scale * dy_tO.T @ (d_tD @ a_RD.T)
        expected.gradients.append((part.grad_a_RD + da_RD, part.grad_b_OR + db_OR))
    return expected


def run_of(siblings: Sequence[Sequence[TrialSegment]], device: torch.device) -> TiledRun:
    """Return the run of the segments of each sibling, which all have one class."""
    kinds = {class_of(len(part.a_RD), has_dropout=bool(part.threshold)) for part in chain.from_iterable(siblings)}
    assert len(kinds) == 1, kinds  # a kernel loads 16 bytes at a time from rows that only have eight in another class
    entries = np.zeros((len(siblings), len(siblings[0])), ENTRY)
    members: list[Member] = []
    for sibling, segments in enumerate(siblings):
        for index, part in enumerate(segments):
            matrices = (part.a_RD, part.b_OR, part.grad_a_RD, part.grad_b_OR)
            addresses = tuple(matrix.data_ptr() for matrix in matrices)
            rank = len(part.a_RD)
            fields = (rank, rank, part.scale, part.threshold, part.keep_factor, 0, part.key)
            entries[sibling, index] = (*addresses, *fields)
            entry = sibling * len(segments) + index
            members.append(Member(segment=index, sibling=sibling, entry=entry, start=part.start, stop=part.stop))
    uploaded, *tables = upload([entries.view(np.int64), *tables_of(members)], device)
    return TiledRun(entries=uploaded, group=group_of(kinds.pop(), members, tables, num_siblings=len(siblings)))


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())

# pyright: basic
"""LoRA of many segments in a few launches, by torch's grouped matmul with ranks padded by zeros.

The reference is the loop in lora_linear.py, which also computes everything that isn't grouped: DoRA, dropout, and
an adapter without others of its width. Shape suffixes: T tokens, t tokens of a run, D input features, O output
features, R rank, W padded rank, G groups of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import SiteViews
from lora_core.runtime.transfers import upload

if TYPE_CHECKING:
    from lora_core.layers.lora_linear import Piece

MIN_WIDTH = 8
"""Minimum padded rank. Larger ones are powers of two, so that adapters of rank 16 aren't padded to another's 256."""
ALIGNMENT_BYTES = 16  # required alignment of every stride in a grouped matmul


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBucket:
    """Rows [start, stop) of the pack. `views` is None in gaps between segments, where the padded weights are zero."""

    start: int
    stop: int
    views: SiteViews | None

    @property
    def rank(self) -> int:
        """Rank of the weights. If a start is subtracted, it is twice that of the gradients."""
        return 0 if self.views is None else len(self.views.a_RD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacks:
    """Padded weights of a run. They are zero beyond each group's rank, and so are h and its gradient."""

    a_GWD: Tensor
    b_GOW: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """End of each group, int32 [G], relative to the run's first row, and the scale of each row, fp32 [t, 1]."""

    ends_G: Tensor
    scales_t1: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketRun:
    """Adjacent groups whose adapters are padded to the same width."""

    groups: tuple[RankBucket, ...]
    stacks: Stacks
    layout: Layout

    @property
    def rows(self) -> slice:
        return slice(self.groups[0].start, self.groups[-1].stop)

    def add(self, y_TO: Tensor, x_TD: Tensor) -> Tensor:
        """Compute y += scale·x Aᵀ Bᵀ in place. Returns h = scale·x Aᵀ, [t, W], for the backward."""
        h_tW = grouped(x_TD[self.rows], self.stacks.a_GWD.transpose(1, 2), self.layout).mul_(self.layout.scales_t1)
        # Not +=, which copies the slice onto itself afterwards.
        y_TO[self.rows].add_(grouped(h_tW, self.stacks.b_GOW.transpose(1, 2), self.layout))
        return h_tW

    def add_gradients(self, dx_TD: Tensor | None, dy_TO: Tensor, x_TD: Tensor, h_tW: Tensor) -> None:
        """Accumulate dA and dB into the adapters, and the LoRA part of dx in place, unless `dx_TD` is None."""
        x_tD, dy_tO = x_TD[self.rows], dy_TO[self.rows]
        dh_tW = grouped(dy_tO, self.stacks.b_GOW, self.layout).mul_(self.layout.scales_t1)
        _accumulate(
            [(None if group.views is None else group.views.grad_b_OR) for group in self.groups],
            grouped(dy_tO.T, h_tW, self.layout),
            rank_dim=1,
        )
        _accumulate(
            [(None if group.views is None else group.views.grad_a_RD) for group in self.groups],
            grouped(dh_tW.T, x_tD, self.layout),
            rank_dim=0,
        )
        if dx_TD is not None:
            dx_TD[self.rows].add_(grouped(dh_tW, self.stacks.a_GWD, self.layout))


def grouped(left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    """Multiply [t, K] @ [G, K, N] to [t, N], each row with its group's matrix, or [M, t] @ [t, N] to [G, M, N].

    The second form is one matmul per group. No row of another group is read in either form.
    """
    product = getattr(torch.nn.functional, "grouped_mm", None)  # public from torch 2.10 on
    return (product or torch._grouped_mm)(left, right, offs=layout.ends_G)  # pyright: ignore


def _accumulate(gradients: list[Tensor | None], products_GMN: Tensor, *, rank_dim: int) -> None:
    """Add to each gradient its group's product without padding, rounded to the compute dtype first, as in the loop.

    The padding is cut off while the products are widened, as far as no gradient needs it: `_foreach_add_` takes one
    launch for all gradients only if each has the strides of its product.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    rank = max(gradient.shape[rank_dim] for gradient in present)
    wide_GMN = products_GMN.narrow(rank_dim + 1, 0, rank).to(torch.float32, memory_format=torch.contiguous_format)
    products = [
        wide_MN.narrow(rank_dim, 0, gradient.shape[rank_dim])
        for gradient, wide_MN in zip(gradients, wide_GMN.unbind(), strict=True)
        if gradient is not None
    ]
    torch._foreach_add_(present, products)  # pyright: ignore[reportPrivateImportUsage]


class GroupedLora:
    """Splits the segments of a linear into those for the loop and runs. Each attached model has one.

    Padded weights are cached between ticks until the weights of an adapter or the jobs in the pack change.
    """

    def __init__(self, kernel: Literal["loop", "grouped_mm"]) -> None:
        self.kernel = kernel
        self._stacks: dict[tuple[str, int], tuple[list[_Source], Stacks]] = {}

    def divide(
        self, module: str, pieces: tuple["Piece", ...], x_TD: Tensor
    ) -> tuple[tuple["Piece", ...], tuple[BucketRun, ...]]:
        """Return (pieces for the loop, runs), which together cover all `pieces` of `module`."""
        if self.kernel == "loop" or not pieces or not _is_aligned(pieces[0].views):
            return pieces, ()
        alone = [piece for piece in pieces if piece.dropout is not None or piece.views.magnitude is not None]
        plain = [piece for piece in pieces if piece.dropout is None and piece.views.magnitude is None]
        runs: list[BucketRun] = []
        for width, members in groupby(plain, key=lambda piece: width_of(len(piece.views.a_RD))):
            together = list(members)
            if len(together) == 1:  # no launch to save, and the loop needs one pass less over y
                alone += together
            else:
                runs.append(self._run(module, len(runs), together, width, x_TD))
        return tuple(sorted(alone, key=lambda piece: piece.start)), tuple(runs)

    def forget(self) -> None:
        """Free the memory of padded weights."""
        self._stacks.clear()

    def _run(self, module: str, index: int, pieces: Sequence["Piece"], width: int, like: Tensor) -> BucketRun:
        groups: list[RankBucket] = []
        for piece in pieces:
            if groups and groups[-1].stop < piece.start:
                groups.append(RankBucket(start=groups[-1].stop, stop=piece.start, views=None))
            groups.append(RankBucket(start=piece.start, stop=piece.stop, views=piece.views))
        spans = tuple((group.stop - group.start, group.views.scale if group.views else 0.0) for group in groups)
        return BucketRun(
            groups=tuple(groups),
            stacks=self._stacked(module, index, groups, width),
            layout=layout_of(spans, str(like.device)),
        )

    def _stacked(self, module: str, index: int, groups: list[RankBucket], width: int) -> Stacks:
        sources = [_Source(group.views) for group in groups]
        kept = self._stacks.get((module, index))
        if kept is None or kept[0] != sources:
            self._stacks[module, index] = kept = sources, stack(groups, width)
        return kept[1]


class _Source:
    """Identity of weights in a state: equal only if the tensors are the same objects and unchanged since."""

    def __init__(self, views: SiteViews | None) -> None:
        self._tensors = () if views is None else (ref(views.a_RD), ref(views.b_OR))  # weak: allows eviction
        self._versions = () if views is None else (views.a_RD._version, views.b_OR._version)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Source) or self._versions != other._versions:
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        return all(one() is not None and one() is another() for one, another in pairs)

    __hash__ = None  # type: ignore[assignment]


def width_of(rank: int) -> int:
    """Return the power of two to which a rank is padded."""
    return max(MIN_WIDTH, 1 << (rank - 1).bit_length())


def stack(groups: Sequence[RankBucket], width: int) -> Stacks:
    """Return the padded weights of the groups. Takes two launches for any number of groups, and two for padding."""
    like = next(group.views for group in groups if group.views is not None)
    most = width - min(group.rank for group in groups)
    zeros_WD, zeros_OW = like.a_RD.new_zeros(most, like.a_RD.shape[1]), like.b_OR.new_zeros(len(like.b_OR), most)
    a_parts: list[Tensor] = []
    b_parts: list[Tensor] = []
    for group in groups:
        padding = width - group.rank
        if group.views is not None:
            a_parts.append(group.views.a_RD)
            b_parts.append(group.views.b_OR)
        if padding:
            a_parts.append(zeros_WD[:padding])
            b_parts.append(zeros_OW[:, :padding])
    return Stacks(
        a_GWD=torch.cat(a_parts).view(len(groups), width, -1),
        b_GOW=torch.cat(b_parts, dim=1).view(-1, len(groups), width).transpose(0, 1),
    )


@lru_cache(maxsize=16)
def layout_of(spans: tuple[tuple[int, float], ...], device: str) -> Layout:
    """Return the layout of groups with these (length, scale). Cached, since nearly all linears of a tick share one."""
    lengths, scales = zip(*spans, strict=True)
    scales_t = np.repeat(np.array(scales, np.float32), lengths)
    ends_G, scales_t1 = upload([np.cumsum(lengths, dtype=np.int32), scales_t[:, None]], device)
    return Layout(ends_G=ends_G, scales_t1=scales_t1)


def _is_aligned(views: SiteViews) -> bool:
    numbers = ALIGNMENT_BYTES // views.a_RD.element_size()
    return views.a_RD.shape[1] % numbers == 0 and len(views.b_OR) % numbers == 0

# pyright: basic
"""The linear layer of a pack: one GEMM of the frozen weight over all tokens, and LoRA by segment.

Shape suffixes: T tokens, t tokens of a segment, D input features, O output features, R rank. Gradients of A and B are
written directly to each job's adapter, not through autograd. The gradient of the frozen weight is never computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_core.adapter.dora import add_magnitude, add_magnitude_gradient
from lora_core.adapter.flat_adapter import SiteViews
from lora_core.kernels import batch_invariant, generation
from lora_core.kernels.batch_invariant import ExactProducts
from lora_core.kernels.gpu.tiled_run import TiledRun
from lora_core.kernels.numba_jit import array_of, runs_on
from lora_core.layers.recomputed_inputs import InputOrigin, save_input, saved_input
from lora_core.packing.packed_batch import BatchSegment, DropoutKey, current_kernels, num_used_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One job's segment in one linear: rows [start, stop), views of its adapter, and its dropout or None."""

    start: int
    stop: int
    views: SiteViews
    module: str
    dropout: DropoutKey | None
    is_by_row: bool = False

    def keep_tD(self, x_tD: Tensor) -> Tensor | None:
        """Return the dropout mask of the elements to keep. None without dropout."""
        return None if self.dropout is None else self.dropout.keep_TD(self.module, x_tD)

    def dropped(self, x_tD: Tensor, keep_tD: Tensor | None) -> Tensor:
        return x_tD if self.dropout is None or keep_tD is None else self.dropout.dropped(x_tD, keep_tD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """State of a piece for its backward: h = scale · dropout(x) Aᵀ, the dropout mask, and DoRA's v.

    Creating the mask again costs five times as much as applying it. Keeping it takes one byte per element.
    """

    h_tR: Tensor
    keep_tD: Tensor | None
    v_tO: Tensor | None = None


def pieces_of(segments: Sequence[BatchSegment], module: str) -> tuple[Piece, ...]:
    """Return the segments whose adapters change `module`."""
    return tuple(piece_of(segment, module) for segment in segments if module in segment.adapter.sites)


def piece_of(segment: BatchSegment, module: str) -> Piece:
    return Piece(
        start=segment.start,
        stop=segment.stop,
        views=segment.adapter.sites[module],
        module=module,
        dropout=segment.dropout,
        is_by_row=segment.is_by_row,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainWeight:
    """The frozen weight of a linear, in the layout that a GEMM reads."""

    weight_OD: Tensor
    bias_O: Tensor | None


def add_lora(y_TO: Tensor, x_TD: Tensor, pieces: tuple[Piece, ...], linear: PlainWeight | None) -> list[Branch]:
    """Add h Bᵀ to y in place by segment, or apply DoRA, which needs `linear`.

    Returns the branch of each piece, except of those that are computed row by row, which have no backward.
    """
    branches: list[Branch] = []
    for piece in pieces:
        views, x_tD, y_tO = piece.views, x_TD[piece.start : piece.stop], y_TO[piece.start : piece.stop]
        if piece.is_by_row and runs_on(x_tD):
            _add_rows(y_tO, x_tD, views, None if linear is None else linear.bias_O)
            continue
        keep_tD = piece.keep_tD(x_tD)
        d_tD = piece.dropped(x_tD, keep_tD)
        h_tR = (d_tD @ views.a_RD.T).mul_(views.scale)
        v_tO = None
        if views.magnitude is None:
            y_tO.addmm_(h_tR, views.b_OR.T)
        else:
            assert linear is not None, "admission rejects DoRA if the weight can't be read"
            v_tO = add_magnitude(
                y_tO,
                d_tD,
                h_tR,
                views,
                weight_OD=linear.weight_OD,
                bias_O=linear.bias_O,
                with_dropout=keep_tD is not None,
            )
        branches.append(Branch(h_tR=h_tR, keep_tD=keep_tD, v_tO=v_tO))
    return branches


def _add_rows(y_tO: Tensor, x_tD: Tensor, views: SiteViews, bias_O: Tensor | None) -> None:
    none = np.empty(0, np.float32)
    magnitude = views.magnitude
    generation.add_lora_rows(
        array_of(x_tD.contiguous()).reshape(-1),
        array_of(y_tO).reshape(-1),
        array_of(views.a_RD).reshape(-1),
        array_of(views.b_OR).reshape(-1),
        views.scale,
        len(views.a_RD),
        none if bias_O is None or magnitude is None else array_of(bias_O),
        none if magnitude is None else array_of(magnitude.factor_O),
    )


def add_lora_gradients(
    dx_TD: Tensor | None, received: list[Tensor], x_TD: Tensor, branches: list[Branch], pieces: tuple[Piece, ...]
) -> None:
    """Accumulate dA and dB into the adapters, and the LoRA part of dx in place, unless `dx_TD` is None.

    `received` contains the gradient [t, O] of each piece's scale·B A dropout(x).
    """
    for piece, branch, dy_tO in zip(pieces, branches, received, strict=True):
        views, x_tD = piece.views, x_TD[piece.start : piece.stop]
        dh_tR = (dy_tO @ views.b_OR).mul_(views.scale)
        rank = len(views.grad_a_RD)  # the weights may have twice this rank; the second half is frozen
        accumulate(views.grad_b_OR, dy_tO.T, branch.h_tR[:, :rank])
        accumulate(views.grad_a_RD, dh_tR[:, :rank].T, piece.dropped(x_tD, branch.keep_tD))
        if dx_TD is None:
            continue
        if piece.dropout is None:
            dx_TD[piece.start : piece.stop].addmm_(dh_tR, views.a_RD)
        else:
            dx_TD[piece.start : piece.stop].add_(piece.dropped(dh_tR @ views.a_RD, branch.keep_tD))


def received_by_lora(dy_TO: Tensor, branches: list[Branch], pieces: tuple[Piece, ...]) -> list[Tensor]:
    """Return dy of each piece. With DoRA it is scaled, and the gradient of the magnitude is accumulated."""
    received: list[Tensor] = []
    for piece, branch in zip(pieces, branches, strict=True):
        dy_tO, magnitude = dy_TO[piece.start : piece.stop], piece.views.magnitude
        if magnitude is not None and branch.v_tO is not None:
            dy_tO = add_magnitude_gradient(dy_tO, branch.v_tO, magnitude)
        received.append(dy_tO)
    return received


def input_gradient(  # noqa: PLR0917
    dy_TO: Tensor,
    weight_OD: Tensor,
    exact: ExactProducts | None,
    received: list[Tensor],
    branches: list[Branch],
    pieces: tuple[Piece, ...],
) -> Tensor:
    """Return dx through the frozen weight, [T, D]."""
    dx_TD = batch_invariant.times(through_weight(dy_TO, received, branches, pieces), weight_OD, exact)
    add_through_dropout(dx_TD, dy_TO, weight_OD, received, branches, pieces)
    return dx_TD


def through_weight(dy_TO: Tensor, received: list[Tensor], branches: list[Branch], pieces: tuple[Piece, ...]) -> Tensor:
    """Return the dy that passes through the frozen weight. With DoRA without dropout it is scaled."""
    magnified = [
        branch.v_tO is not None and piece.dropout is None for branch, piece in zip(branches, pieces, strict=True)
    ]
    if not any(magnified):
        return dy_TO
    through_weight_TO = dy_TO.clone()
    for piece, dv_tO, is_magnified in zip(pieces, received, magnified, strict=True):
        if is_magnified:
            through_weight_TO[piece.start : piece.stop] = dv_tO
    return through_weight_TO


def add_through_dropout(  # noqa: PLR0917
    dx_TD: Tensor,
    dy_TO: Tensor,
    weight_OD: Tensor,
    received: list[Tensor],
    branches: list[Branch],
    pieces: tuple[Piece, ...],
) -> None:
    """Add the gradient through W dropout(x), which DoRA scales by c - 1. W x itself keeps the factor 1."""
    for piece, branch, dv_tO in zip(pieces, branches, received, strict=True):
        if branch.v_tO is not None and piece.dropout is not None:
            rows = slice(piece.start, piece.stop)
            dx_TD[rows].add_(piece.dropped((dv_tO - dy_TO[rows]) @ weight_OD, branch.keep_tD))


def accumulate(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute gradient += left @ right. Below fp32 the product is rounded to its dtype first, as in autograd."""
    if gradient.dtype == left.dtype:
        gradient.addmm_(left, right)
    else:
        gradient.add_(left @ right)


class PackedLinear(torch.autograd.Function):
    """y = x Wᵀ + b over all tokens, plus LoRA of each segment. Saves x once, the small h, and the masks.

    `leaf` is a scalar that requires a gradient if an adapter is present. It makes autograd visit this node, which has
    no weight that autograd knows, and never gets a gradient. `runs` contains the segments that are not in `pieces`
    because kernels compute them (tiled_lora.py). With `origin`, the backward recomputes x.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes by position)
        ctx,
        x_TD: Tensor,
        leaf: Tensor | None,
        linear: PlainWeight,
        pieces: tuple[Piece, ...],
        runs: tuple[TiledRun, ...] = (),
        origin: InputOrigin | None = None,
    ):
        ctx.exact = current_kernels().batch_invariant
        y_TO = batch_invariant.linear(x_TD, linear.weight_OD, linear.bias_O, ctx.exact, num_used_rows())
        ctx.pieces, ctx.runs = pieces, runs
        ctx.branches = add_lora(y_TO, x_TD, pieces, linear)
        ctx.hidden = [run.add([y_TO], x_TD) for run in runs]
        ctx.weight_OD = linear.weight_OD  # frozen, so save_for_backward's checks aren't needed
        if pieces or runs:
            save_input(ctx, x_TD, origin)
        return y_TO

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        dy_TO = grad_outputs[0].contiguous()
        received = received_by_lora(dy_TO, ctx.branches, ctx.pieces)
        dx_TD = None
        if ctx.needs_input_grad[0]:
            dx_TD = input_gradient(dy_TO, ctx.weight_OD, ctx.exact, received, ctx.branches, ctx.pieces)
        if ctx.pieces or ctx.runs:
            x_TD = saved_input(ctx)
            add_lora_gradients(dx_TD, received, x_TD, ctx.branches, ctx.pieces)
            for run, h_tW in zip(ctx.runs, ctx.hidden, strict=True):
                run.add_gradients(dx_TD, [dy_TO], x_TD, h_tW)
        return dx_TD, None, None, None, None, None


class PackedDelta(torch.autograd.Function):
    """y plus LoRA of each segment, for a linear with a forward of its own (quantized or sharded)."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes by position)
        ctx,
        y_TO: Tensor,
        x_TD: Tensor,
        leaf: Tensor,
        pieces: tuple[Piece, ...],
        runs: tuple[TiledRun, ...] = (),
        origin: InputOrigin | None = None,
    ):
        out_TO = y_TO.clone()
        ctx.pieces, ctx.runs = pieces, runs
        ctx.branches = add_lora(out_TO, x_TD, pieces, None)
        ctx.hidden = [run.add([out_TO], x_TD) for run in runs]
        save_input(ctx, x_TD, origin)
        return out_TO

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        x_TD = saved_input(ctx)
        dy_TO = grad_outputs[0].contiguous()
        dx_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[1] else None
        received = received_by_lora(dy_TO, ctx.branches, ctx.pieces)
        add_lora_gradients(dx_TD, received, x_TD, ctx.branches, ctx.pieces)
        for run, h_tW in zip(ctx.runs, ctx.hidden, strict=True):
            run.add_gradients(dx_TD, [dy_TO], x_TD, h_tW)
        return dy_TO, dx_TD, None, None, None, None

# pyright: basic
"""Fused projections: linears with the same input (q, k, v; gate, up) as one autograd node.

The input gradient is accumulated by the matmuls instead of separate additions. The A matrices of one job, adjacent in
its adapter, are used as one matrix, so three thin matmuls become one. On a GPU the kernels of segmented_lora.py
compute all segments and linears together. The first of these sibling linears computes all
of them, and the others fetch their outputs from the pass. Shape suffixes: T tokens, t tokens of a segment, D input
features, O output features, S the sum of ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.adapter.flat_adapter import JointViews
from lora_core.kernels import batch_invariant
from lora_core.kernels.gpu.tiled_run import TiledRun
from lora_core.layers.lora_linear import (
    Piece,
    PlainWeight,
    accumulate,
    add_lora,
    add_lora_gradients,
    add_through_dropout,
    pieces_of,
    received_by_lora,
    through_weight,
)
from lora_core.layers.recomputed_inputs import InputOrigin, origin_of, save_input, saved_input
from lora_core.layers.tiled_lora import SegmentedLora
from lora_core.packing.packed_batch import BatchSegment, PackedBatch, computed_ahead, current_kernels, num_used_rows

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names as in Llama and similar families. A family with other names computes its linears one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Siblings:
    """Linears with the same input, in the order in which the block calls them."""

    modules: tuple[str, ...]
    weights: tuple[PlainWeight, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class JointPiece:
    """A segment whose A matrices are used as one: rows [start, stop) of the pack."""

    start: int
    stop: int
    joint: JointViews

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Segments of a pack in sibling linears.

    `joint` have joint A matrices, `single` are computed separately for a linear, by its index, and `runs` are those of
    kernels.
    """

    joint: tuple[JointPiece, ...]
    single: tuple[tuple[int, tuple[Piece, ...]], ...]
    runs: tuple[TiledRun, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.joint and not self.runs and not self.single


def find_siblings(linears: Mapping[str, nn.Module]) -> dict[str, Siblings]:
    """Return sibling linears by the path of the first. `linears` must be in the model's order, as are adapters."""
    found: dict[str, Siblings] = {}
    for path in linears:
        parent, _, name = path.rpartition(".")
        for names in (names for names in NAMES if names[0] == name):
            modules = tuple(f"{parent}.{other}" for other in names)
            parts = [linears.get(module) for module in modules]
            if all(type(part) is nn.Linear and part.weight.device.type != "meta" for part in parts):
                found[path] = Siblings(modules=modules, weights=tuple(map(_plain, parts)))
    return found


def _plain(linear: nn.Module | None) -> PlainWeight:
    assert isinstance(linear, nn.Linear)
    return PlainWeight(weight_OD=linear.weight, bias_O=linear.bias)


def forward_siblings(
    siblings: Siblings, pack: PackedBatch, leaf: Tensor, segment_op: SegmentedLora, x: Tensor
) -> Tensor:
    """Return the output of the first sibling. Those of the others are stored in the pass."""
    shares = shares_of(pack, siblings.modules, segment_op, x.device)
    outputs = PackedSiblings.apply(
        x.reshape(-1, x.shape[-1]), None if shares.is_empty else leaf, siblings.weights, shares, origin_of(x)
    )
    first, *others = (y_TO.view(*x.shape[:-1], -1) for y_TO in outputs)
    for module, output in zip(siblings.modules[1:], others, strict=True):
        computed_ahead()[module] = (x, output)
    return first


def taken_from_ahead(module: str, x: Tensor) -> Tensor | None:
    """Return the output that a sibling has computed for exactly this input tensor, or None."""
    found = computed_ahead().pop(module, None)
    return found[1] if found is not None and found[0] is x else None


def shares_of(pack: PackedBatch, modules: tuple[str, ...], segment_op: SegmentedLora, device: torch.device) -> Shares:
    if segment_op.kernel == "tiled":
        share = segment_op.divide(modules, pack, device)
        return Shares(joint=(), single=_by_index(share.pieces) if any(share.pieces) else (), runs=share.runs)
    joint: list[JointPiece] = []
    alone: list[BatchSegment] = []
    for segment in pack.segments:
        is_plain = segment.dropout is None and not segment.is_by_row
        views = segment.adapter.joint(modules) if is_plain else None
        if views is None:
            alone.append(segment)
        else:
            joint.append(JointPiece(start=segment.start, stop=segment.stop, joint=views))
    return Shares(joint=tuple(joint), single=_by_index(pieces_of(alone, module) for module in modules))


def _by_index(of_linears: Iterable[tuple[Piece, ...]]) -> tuple[tuple[int, tuple[Piece, ...]], ...]:
    """Return the index and the pieces of each linear that has any."""
    return tuple((index, pieces) for index, pieces in enumerate(of_linears) if pieces)


class PackedSiblings(torch.autograd.Function):
    """y of each linear including LoRA of each segment. `leaf` as in PackedLinear. Saves x once."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes by position)
        ctx,
        x_TD: Tensor,
        leaf: Tensor | None,
        weights: tuple[PlainWeight, ...],
        shares: Shares,
        origin: InputOrigin | None = None,
    ):
        ctx.exact = current_kernels().batch_invariant
        outputs = [
            batch_invariant.linear(x_TD, weight.weight_OD, weight.bias_O, ctx.exact, num_used_rows())
            for weight in weights
        ]
        ctx.weights, ctx.shares = weights, shares
        ctx.hidden = [_add_joint(outputs, x_TD, piece) for piece in shares.joint]
        ctx.branches = [add_lora(outputs[index], x_TD, pieces, weights[index]) for index, pieces in shares.single]
        ctx.tiled = [run.add(outputs, x_TD) for run in shares.runs]
        if not shares.is_empty:
            save_input(ctx, x_TD, origin)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        gradients = [dy_TO.contiguous() for dy_TO in grad_outputs]
        single: tuple[tuple[int, tuple[Piece, ...]], ...] = ctx.shares.single
        received = [
            received_by_lora(gradients[index], branches, pieces)
            for (index, pieces), branches in zip(single, ctx.branches, strict=True)
        ]
        dx_TD = _input_gradient(ctx, gradients, received) if ctx.needs_input_grad[0] else None
        if not ctx.shares.is_empty:
            x_TD = saved_input(ctx)
            for piece, h_tS in zip(ctx.shares.joint, ctx.hidden, strict=True):
                _add_joint_gradients(dx_TD, gradients, x_TD, h_tS, piece)
            for of_linear, branches, (_, pieces) in zip(received, ctx.branches, single, strict=True):
                add_lora_gradients(dx_TD, of_linear, x_TD, branches, pieces)
            for run, h_tW in zip(ctx.shares.runs, ctx.tiled, strict=True):
                run.add_gradients(dx_TD, gradients, x_TD, h_tW)
        return dx_TD, None, None, None, None


def _add_joint(outputs: list[Tensor], x_TD: Tensor, piece: JointPiece) -> Tensor:
    """Add h Bᵀ to the y of each linear in place. Returns h = scale·x Aᵀ, [t, S]."""
    h_tS = (x_TD[piece.rows] @ piece.joint.a_SD.T).mul_(piece.joint.scale)
    for index, ranks, views in piece.joint.parts:
        outputs[index][piece.rows].addmm_(h_tS[:, ranks], views.b_OR.T)
    return h_tS


def _add_joint_gradients(
    dx_TD: Tensor | None, gradients: list[Tensor], x_TD: Tensor, h_tS: Tensor, piece: JointPiece
) -> None:
    """Accumulate dA and dB into the adapter, and the LoRA part of dx in place, unless `dx_TD` is None."""
    dh_tS = torch.empty_like(h_tS)
    for index, ranks, views in piece.joint.parts:
        dy_tO = gradients[index][piece.rows]
        dh_tS[:, ranks] = dy_tO @ views.b_OR
        accumulate(views.grad_b_OR, dy_tO.T, h_tS[:, ranks])
    dh_tS.mul_(piece.joint.scale)
    accumulate(piece.joint.grad_a_SD, dh_tS.T, x_TD[piece.rows])
    if dx_TD is not None:
        dx_TD[piece.rows].addmm_(dh_tS, piece.joint.a_SD)


def _input_gradient(ctx, gradients: list[Tensor], received: list[list[Tensor]]) -> Tensor:
    """Return dx through the frozen weights. Each matmul adds to the previous one's output."""
    parts = {
        index: (of_linear, branches, pieces)
        for (index, pieces), of_linear, branches in zip(ctx.shares.single, received, ctx.branches, strict=True)
    }
    dx_TD = None
    for index, (dy_TO, weight) in enumerate(zip(gradients, ctx.weights, strict=True)):
        through_TO = through_weight(dy_TO, *parts[index]) if index in parts else dy_TO
        if dx_TD is None:
            dx_TD = batch_invariant.times(through_TO, weight.weight_OD, ctx.exact)
        else:
            batch_invariant.add_times(dx_TD, through_TO, weight.weight_OD, ctx.exact)
    assert dx_TD is not None
    for index, part in parts.items():
        add_through_dropout(dx_TD, gradients[index], ctx.weights[index].weight_OD, *part)
    return dx_TD

# pyright: basic
"""LoRA of all segments of a pass in a few launches of Triton kernels (lora_core/kernels/gpu/segmented_lora.py).

A host plans a pass once: tables on the device contain the rows of each segment and the addresses of each adapter. No
Python runs for each segment and linear. The reference is the loop in lora_linear.py, which also computes what isn't
tiled: DoRA, ranks above 128, and linears with an odd number of features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.adapter.site_addresses import SiteLayout, addresses_of, site_layout
from lora_core.kernels.gpu.tables import (
    ENTRY,
    FEATURE_MULTIPLE,
    WIDTHS,
    TileClass,
    TileGroup,
    class_of,
    tiles_and_spans,
)
from lora_core.kernels.gpu.tiled_run import TiledRun
from lora_core.layers.lora_linear import Piece, piece_of, pieces_of
from lora_core.packing.packed_batch import BatchSegment, PackedBatch
from lora_core.runtime.transfers import upload

LOAD_BYTES = 16
"""Alignment of the addresses of A and B, which the kernels load 16 bytes at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteShare:
    """The segments of one linear: `pieces` for the loop, and `runs` for the kernels."""

    pieces: tuple[Piece, ...] = ()
    runs: tuple[TiledRun, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.pieces and not self.runs


NO_SHARE = SiteShare()


class SegmentedLora:
    """Splits the segments of a linear into those for the loop and those for the kernels, for one attached model."""

    def __init__(self, kernel: Literal["loop", "tiled"], linears: Sequence[str]) -> None:
        """`linears` are the module paths that adapters may change."""
        self.kernel = kernel
        self._rows = {name: row for row, name in enumerate(linears)}
        self._layouts = WeakKeyDictionary[FlatAdapter, SiteLayout]()

    def divide(self, module: str, pack: PackedBatch, device: torch.device) -> SiteShare:
        """Return the share of `module` in a pass. Plans the pass at its first linear, for the life of the pack.

        A copy of a pack shares its plans, but may have other segments.
        """
        segments = pack.segments
        if self.kernel == "loop":
            return SiteShare(pieces=pieces_of(segments, module))
        if not segments:
            return NO_SHARE
        if id(segments) not in pack.plans:
            pack.plans[id(segments)] = segments, self.plan(segments, device)
        return pack.plans[id(segments)][1].get(module, NO_SHARE)

    def plan(self, segments: Sequence[BatchSegment], device: torch.device) -> dict[str, SiteShare]:
        """Return the share of each adapted linear, after one upload of all tables."""
        entries = np.zeros((len(self._rows), len(segments)), ENTRY)
        is_tiled = np.zeros(entries.shape, np.bool_)
        for column, segment in enumerate(segments):
            if segment.adapter.spans:
                self._fill(entries[:, column], is_tiled[:, column], segment)
        patterns, pattern_of = np.unique(np.where(is_tiled, entries["rank"], 0), axis=0, return_inverse=True)
        members = [_members(pattern, segments) for pattern in patterns]
        tables = [array for of_pattern in members for spans in of_pattern.values() for array in tiles_and_spans(spans)]
        uploaded, *parts = upload([entries.view(np.int64), *tables], device)
        groups = _groups(members, parts)
        of_linears = uploaded.unbind()
        return {
            name: SiteShare(
                pieces=tuple(
                    piece_of(segments[i], name) for i in np.flatnonzero(entries["rank"][row] * ~is_tiled[row]).tolist()
                ),
                runs=tuple(TiledRun(entries=of_linears[row], group=group) for group in groups[pattern_of.flat[row]]),
            )
            for name, row in self._rows.items()
            if entries["rank"][row].any()
        }

    def _fill(self, entries_L: NDArray[np.void], is_tiled_L: NDArray[np.bool_], segment: BatchSegment) -> None:
        """Fill the entries of the segment in all linears, and whether a kernel computes them."""
        adapter, dropout = segment.adapter, segment.dropout
        layout = self._layouts.get(adapter)
        if layout is None:
            layout = self._layouts[adapter] = site_layout(adapter)
        rows = np.array([self._rows[module] for module in layout.modules])
        addresses = addresses_of(adapter, layout)
        for index, name in enumerate(("a", "b", "grad_a", "grad_b")):
            entries_L[name][rows] = addresses[:, index]
        entries_L["rank"][rows], entries_L["trained"][rows] = layout.ranks, layout.trained
        entries_L["scale"][rows] = layout.scales
        if dropout is not None:
            entries_L["threshold"][rows], entries_L["keep_factor"][rows] = dropout.threshold, dropout.keep_factor
            entries_L["key"][rows] = dropout.key_words(layout.modules)
        is_even = (layout.shapes % FEATURE_MULTIPLE == 0).all(1) & (addresses[:, :2] % LOAD_BYTES == 0).all(1)
        is_tiled_L[rows] = is_even & (layout.ranks <= WIDTHS[-1]) & (not adapter.lora.use_dora)


def _members(
    ranks_S: NDArray[np.int64], segments: Sequence[BatchSegment]
) -> dict[TileClass, list[tuple[int, int, int]]]:
    """Return (segment, first row, last row + 1) of the segments of each class. Segments of rank 0 belong to none."""
    members: dict[TileClass, list[tuple[int, int, int]]] = {}
    for column, (rank, segment) in enumerate(zip(ranks_S.tolist(), segments, strict=True)):
        if rank > 0:
            kind = class_of(rank, has_dropout=segment.dropout is not None)
            members.setdefault(kind, []).append((column, segment.start, segment.stop))
    return members


def _groups(
    members: Sequence[Mapping[TileClass, list[tuple[int, int, int]]]], tables: Sequence[torch.Tensor]
) -> list[list[TileGroup]]:
    """Return the groups of each pattern of ranks. `tables` are their tiles and spans, one after the other."""
    parts = iter(tables)
    return [
        [
            TileGroup(
                kind=kind,
                tiles=next(parts),
                spans=next(parts),
                num_rows=sum(stop - start for _, start, stop in spans),
            )
            for kind, spans in of_pattern.items()
        ]
        for of_pattern in members
    ]

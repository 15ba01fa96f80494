# pyright: basic
"""LoRA of all segments of a pass in a few launches of Triton kernels (lora_core/kernels/gpu/segmented_lora.py).

A host plans a pass once: tables on the device contain the rows of each segment and the addresses of each adapter. No
Python runs for each segment and linear. Linears with the same input (siblings) share their launches. The reference is
the loop in lora_linear.py, which also computes what isn't tiled: DoRA, ranks above 128, and linears with an odd number
of features. Shape suffixes: S segments, L siblings.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
    Member,
    TileClass,
    TileGroup,
    class_of,
    group_of,
    tables_of,
)
from lora_core.kernels.gpu.tiled_run import TiledRun
from lora_core.layers.lora_linear import Piece, piece_of, pieces_of
from lora_core.packing.packed_batch import BatchSegment, PackedBatch
from lora_core.runtime.transfers import upload

LOAD_BYTES = 16
"""Alignment of the addresses of A and B, which the kernels load 16 bytes at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteShare:
    """The segments of one linear or of siblings: for the loop `pieces` of each linear, and `runs` for the kernels."""

    pieces: tuple[tuple[Piece, ...], ...]
    runs: tuple[TiledRun, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.runs and not any(self.pieces)


Modules = tuple[str, ...]
"""One linear, or siblings."""


class SegmentedLora:
    """Splits the segments of linears into those for the loop and those for the kernels, for one attached model."""

    def __init__(
        self, kernel: Literal["loop", "tiled"], linears: Iterable[str], siblings: Iterable[Modules] = ()
    ) -> None:
        """`linears` are the module paths that adapters may change, and `siblings` those of them that have one input."""
        self.kernel = kernel
        in_group = {module: group for group in siblings for module in group}
        self._groups = tuple(dict.fromkeys(in_group.get(name, (name,)) for name in linears))
        self._rows = {name: row for row, name in enumerate(chain.from_iterable(self._groups))}
        self._layouts = WeakKeyDictionary[FlatAdapter, tuple[SiteLayout, NDArray[np.int64]]]()

    def divide(self, modules: Modules, pack: PackedBatch, device: torch.device) -> SiteShare:
        """Return the share of one linear or of siblings in a pass.

        Plans the pass at its first linear, for the life of the pack. A copy of a pack shares its plans, but may have
        other segments. A linear that has siblings and is computed without them has another plan.
        """
        segments = pack.segments
        if self.kernel == "loop":
            return SiteShare(pieces=tuple(pieces_of(segments, module) for module in modules))
        if not segments:
            return _no_share(modules)
        planned = pack.plans.get(id(segments))
        if planned is None:
            planned = pack.plans[id(segments)] = segments, self.plan(segments, device)
        share = planned[1].get(modules)
        if share is None:
            share = planned[1][modules] = self.plan(segments, device, [modules])[modules]
        return share

    def plan(
        self, segments: Sequence[BatchSegment], device: torch.device, groups: Sequence[Modules] | None = None
    ) -> dict[Modules, SiteShare]:
        """Return the share of each linear without siblings, and of all siblings, after one upload of all tables.

        With `groups`, return only the shares of these linears or siblings.
        """
        groups = self._groups if groups is None else groups
        entries = np.zeros((len(self._rows), len(segments)), ENTRY)
        is_tiled = np.zeros(entries.shape, np.bool_)
        for column, segment in enumerate(segments):
            if segment.adapter.spans:
                self._fill(entries[:, column], is_tiled[:, column], segment)
        ranks, looped = np.where(is_tiled, entries["rank"], 0), np.where(is_tiled, 0, entries["rank"])
        has_loop = looped.any()
        members: dict[tuple[int, bytes], dict[TileClass, list[Member]]] = {}  # by number of linears and their ranks
        patterns: list[tuple[int, bytes]] = []
        for modules in groups:
            row = self._rows[modules[0]]
            of_modules = ranks[row : row + len(modules)]
            patterns.append((len(modules), of_modules.tobytes()))
            if patterns[-1] not in members:
                members[patterns[-1]] = _members(of_modules, segments)
        tables = [table for kinds in members.values() for part in kinds.values() for table in tables_of(part)]
        uploaded, *parts = upload([entries.view(np.int64), *tables], device)
        tile_groups = _tile_groups(members, parts)
        shares: dict[Modules, SiteShare] = {}
        for modules, pattern in zip(groups, patterns, strict=True):
            row = self._rows[modules[0]]
            of_modules, tile_group = uploaded[row : row + len(modules)], tile_groups[pattern]
            pieces = ((),) * len(modules)
            if has_loop:
                pieces = tuple(
                    tuple(piece_of(segments[i], name) for i in np.flatnonzero(looped[row + index]).tolist())
                    for index, name in enumerate(modules)
                )
            runs = tuple([TiledRun(entries=of_modules, group=group) for group in tile_group])
            shares[modules] = SiteShare(pieces=pieces, runs=runs)
        return shares

    def _fill(self, entries_L: NDArray[np.void], is_tiled_L: NDArray[np.bool_], segment: BatchSegment) -> None:
        """Fill the entries of the segment in all linears, and whether a kernel computes them."""
        adapter, dropout = segment.adapter, segment.dropout
        known = self._layouts.get(adapter)
        if known is None:
            layout = site_layout(adapter)
            known = self._layouts[adapter] = layout, np.array([self._rows[module] for module in layout.modules])
        layout, rows = known
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


def _no_share(modules: Modules) -> SiteShare:
    return SiteShare(pieces=((),) * len(modules))


def _members(ranks_LS: NDArray[np.int64], segments: Sequence[BatchSegment]) -> dict[TileClass, list[Member]]:
    """Return the members of each class, sibling by sibling. Segments of rank 0 belong to none.

    The order of classes doesn't depend on packmates: siblings of one segment may belong to several, whose dx are added.
    """
    members: dict[TileClass, list[Member]] = {}
    for (sibling, column), rank in zip(np.argwhere(ranks_LS).tolist(), ranks_LS[ranks_LS > 0].tolist(), strict=True):
        segment = segments[column]
        kind = class_of(rank, has_dropout=segment.dropout is not None)
        entry = sibling * len(segments) + column
        member = Member(segment=column, sibling=sibling, entry=entry, start=segment.start, stop=segment.stop)
        members.setdefault(kind, []).append(member)
    return dict(sorted(members.items()))


def _tile_groups(
    members: Mapping[tuple[int, bytes], Mapping[TileClass, list[Member]]], tables: Sequence[torch.Tensor]
) -> dict[tuple[int, bytes], list[TileGroup]]:
    """Return the groups of each pattern of ranks. `tables` are their tiles, spans and joins, one after the other."""
    parts = iter(tables)
    return {
        pattern: [
            group_of(kind, of_kind, [next(parts), next(parts), next(parts)], num_siblings=pattern[0])
            for kind, of_kind in kinds.items()
        ]
        for pattern, kinds in members.items()
    }

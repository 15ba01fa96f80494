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
    NUM_ADDRESSES,
    NUM_WORDS,
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
        """`linears` are the module paths that adapters may change, and `siblings` those of them that have one input.

        `groups` are the linears in this order, each with its siblings.
        """
        self.kernel = kernel
        in_group = {module: group for group in siblings for module in group}
        self.groups = tuple(dict.fromkeys(in_group.get(name, (name,)) for name in linears))
        self._rows = {name: row for row, name in enumerate(chain.from_iterable(self.groups))}
        self._sites = WeakKeyDictionary[FlatAdapter, _Sites]()

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
        groups = self.groups if groups is None else groups
        entries = np.zeros((len(self._rows), len(segments)), ENTRY)
        words = entries.view(np.int64).reshape(*entries.shape, NUM_WORDS)  # numpy copies numbers faster than records
        is_tiled = np.zeros(entries.shape, np.bool_)
        for column, segment in enumerate(segments):
            if segment.adapter.spans:
                self._fill(words[:, column], is_tiled[:, column], segment)
        ranks, looped = np.where(is_tiled, entries["rank"], 0), np.where(is_tiled, 0, entries["rank"])
        has_loop = looped.any()
        members: dict[tuple[int, bytes], dict[TileClass, list[Member]]] = {}  # by number of linears and their ranks
        patterns: list[tuple[int, bytes]] = []
        content, row_bytes = ranks.tobytes(), ranks.shape[1] * ranks.itemsize
        for modules in groups:
            row, size = self._rows[modules[0]], len(modules)
            pattern = size, content[row * row_bytes : (row + size) * row_bytes]
            patterns.append(pattern)
            if pattern not in members:
                members[pattern] = _members(ranks[row : row + size], segments)
        tables = [table for kinds in members.values() for part in kinds.values() for table in tables_of(part)]
        uploaded, *parts = upload([entries.view(np.int64), *tables], device)
        tile_groups = _tile_groups(members, parts)
        shares: dict[Modules, SiteShare] = {}
        for modules, pattern, entries_of in zip(groups, patterns, self._split(uploaded, groups), strict=True):
            pieces = ((),) * len(modules)
            if has_loop:
                row = self._rows[modules[0]]
                pieces = tuple(
                    tuple(piece_of(segments[i], name) for i in np.flatnonzero(looped[row + index]).tolist())
                    for index, name in enumerate(modules)
                )
            runs = tuple([TiledRun(entries=entries_of, group=group) for group in tile_groups[pattern]])
            shares[modules] = SiteShare(pieces=pieces, runs=runs)
        return shares

    def _split(self, entries: torch.Tensor, groups: Sequence[Modules]) -> Sequence[torch.Tensor]:
        """Return the entries of each group. For all groups at once, whose rows are in order, in one operation."""
        if groups is self.groups:
            return entries.split([len(modules) for modules in groups])
        return [entries[self._rows[modules[0]] :][: len(modules)] for modules in groups]

    def _fill(self, words_L: NDArray[np.int64], is_tiled_L: NDArray[np.bool_], segment: BatchSegment) -> None:
        """Fill the entries of the segment in all linears, int64 [L, NUM_WORDS], and whether a kernel computes them."""
        adapter, dropout = segment.adapter, segment.dropout
        sites = self._sites.get(adapter)
        if sites is None:
            sites = self._sites[adapter] = _sites_of(adapter, self._rows)
        words_N = sites.words.copy()
        words_N[:, :NUM_ADDRESSES] = addresses = addresses_of(adapter, sites.layout)
        if dropout is not None:
            entries_N = words_N.view(ENTRY)[:, 0]
            entries_N["threshold"], entries_N["keep_factor"] = dropout.threshold, dropout.keep_factor
            entries_N["key"] = dropout.philox_keys(sites.layout.modules)
        words_L[sites.rows] = words_N
        is_tiled_L[sites.rows] = sites.is_tiled & (addresses[:, :2] % LOAD_BYTES == 0).all(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sites:
    """The N linears of an adapter: their rows in the tables, and what no pass changes in their entries."""

    layout: SiteLayout
    rows: slice | NDArray[np.int64]
    words: NDArray[np.int64]
    is_tiled: NDArray[np.bool_]


def _sites_of(adapter: FlatAdapter, rows: Mapping[str, int]) -> _Sites:
    layout = site_layout(adapter)
    entries = np.zeros(len(layout.modules), ENTRY)
    entries["rank"], entries["trained"], entries["scale"] = layout.ranks, layout.trained, layout.scales
    numbers = np.array([rows[module] for module in layout.modules])
    is_range = np.array_equal(numbers, np.arange(numbers[0], numbers[0] + len(numbers)))
    is_even = (layout.shapes % FEATURE_MULTIPLE == 0).all(1)
    return _Sites(
        layout=layout,
        rows=slice(int(numbers[0]), int(numbers[-1]) + 1) if is_range else numbers,
        words=entries.view(np.int64).reshape(-1, NUM_WORDS),
        is_tiled=is_even & (layout.ranks <= WIDTHS[-1]) & (not adapter.lora.use_dora),
    )


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

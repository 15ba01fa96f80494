"""The plan of a pass: which segments the kernels compute, in which tiles, and where each adapter is in memory."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.adapter.slice_gradients import with_own_gradient
from lora_core.config import LoraConfig
from lora_core.kernels.gpu.tables import ENTRY, TileClass
from lora_core.layers.tiled_lora import SegmentedLora, SiteShare
from lora_core.packing.packed_batch import DropoutKey, PackedBatch, SliceInput, build_pack

CPU = torch.device("cpu")
SHAPES = {"q": (32, 48), "v": (32, 16), "odd": (32, 15)}
KEY = DropoutKey(probability=0.25, seed=7, step=2, slice_index=1)


def adapter(lora: LoraConfig, *modules: str) -> FlatAdapter:
    targets = tuple(
        AdaptedModule(name=module, in_features=SHAPES[module][0], out_features=SHAPES[module][1]) for module in modules
    )
    frozen = {module: torch.randn(SHAPES[module][1], SHAPES[module][0]) for module in modules}
    return FlatAdapter(targets, lora, dtype=torch.bfloat16, device="cpu", frozen=frozen)


def pack_of(*parts: tuple[int, FlatAdapter, DropoutKey | None]) -> PackedBatch:
    slices = [
        SliceInput(
            adapter=of_slice,
            sequences=((np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.uint8)),),
            label_weight=0.0,
            dropout=key,
        )
        for num_tokens, of_slice, key in parts
    ]
    return build_pack(slices, device="cpu")


def entries_of(share: SiteShare) -> np.ndarray:
    return share.runs[0].entries.numpy().reshape(-1).view(ENTRY)


def test_tiles_cover_the_rows_of_their_segments_and_depend_on_no_packmate() -> None:
    small, large = adapter(LoraConfig(rank=16, alpha=32), "q"), adapter(LoraConfig(rank=16, alpha=8), "q")
    op = SegmentedLora("tiled", list(SHAPES))

    (run,) = op.divide(("q",), pack_of((7, small, None), (130, large, None)), CPU).runs
    (alone,) = op.divide(("q",), pack_of((130, large, None)), CPU).runs

    assert [tile[:5] for tile in run.group.tiles.tolist()] == [
        *([0, 0, 7, 0, 0], [1, 7, 64, 7, 0], [1, 71, 64, 71, 64], [1, 135, 2, 135, 128])
    ]
    assert run.group.spans.tolist() == [[0, 0, 7, 0, 0], [1, 7, 137, 7, 0]]
    assert run.group.num_rows == 137
    assert alone.group.tiles[:, [2, 4]].tolist() == run.group.tiles[1:, [2, 4]].tolist()


def test_entries_contain_the_addresses_of_weights_and_gradients() -> None:
    whole = adapter(LoraConfig(rank=8, alpha=4), "q", "v")
    replica = with_own_gradient(whole)
    op = SegmentedLora("tiled", list(SHAPES))

    entries = entries_of(op.divide(("v",), pack_of((3, whole, KEY), (4, replica, KEY)), CPU))

    for entry, part in zip(entries, (whole, replica), strict=True):
        views = part.sites["v"]
        matrices = (views.a_RD, views.b_OR, views.grad_a_RD, views.grad_b_OR)
        assert [entry[name] for name in ("a", "b", "grad_a", "grad_b")] == [matrix.data_ptr() for matrix in matrices]
        assert (entry["rank"], entry["trained"], entry["scale"]) == (8, 8, 0.5)
        assert (entry["threshold"], entry["keep_factor"]) == (49152, 65536 / 49152)
        assert entry["key"].tolist() == KEY.philox_keys(["v"])[0].tolist()


def test_weights_with_a_frozen_start_have_twice_the_trained_rank() -> None:
    paired = adapter(LoraConfig(rank=4, alpha=4, init_lora_weights="olora"), "q")

    share = SegmentedLora("tiled", list(SHAPES)).divide(("q",), pack_of((3, paired, None)), CPU)

    (entry,) = entries_of(share)
    assert (entry["rank"], entry["trained"]) == (8, 4)
    assert entry["a"] == paired.sites["q"].a_RD.data_ptr()
    assert share.runs[0].group.kind == TileClass(width=16, is_aligned=True, has_dropout=False)


def test_segments_of_another_class_have_a_run_of_their_own() -> None:
    parts = [adapter(LoraConfig(rank=rank, alpha=1), "q") for rank in (16, 12, 8, 40)]

    runs = SegmentedLora("tiled", list(SHAPES)).divide(("q",), pack_of(*((5, part, None) for part in parts)), CPU).runs

    assert {(run.group.kind.width, run.group.kind.is_aligned): run.group.spans[:, 0].tolist() for run in runs} == {
        (16, True): [0, 2],
        (16, False): [1],
        (64, True): [3],
    }


@pytest.mark.parametrize(
    ("lora", "modules"),
    [
        (LoraConfig(rank=8, alpha=1, use_dora=True), ("q",)),
        (LoraConfig(rank=129, alpha=1), ("q",)),
        (LoraConfig(rank=3, alpha=1), ("odd", "q")),  # B of q is not at a multiple of 16 bytes
    ],
)
def test_loop_computes_what_the_kernels_do_not(lora: LoraConfig, modules: tuple[str, ...]) -> None:
    plain, other = adapter(LoraConfig(rank=8, alpha=1), "q"), adapter(lora, *modules)
    op = SegmentedLora("tiled", list(SHAPES))

    share = op.divide(("q",), pack_of((5, plain, None), (6, other, KEY)), CPU)

    assert [piece.start for piece in share.pieces[0]] == [5]
    assert [run.group.spans[:, 0].tolist() for run in share.runs] == [[0]]


def test_siblings_share_tables_and_the_rows_of_h() -> None:
    both, only_v = (adapter(LoraConfig(rank=8, alpha=4), *modules) for modules in (("q", "v"), ("v",)))
    op = SegmentedLora("tiled", list(SHAPES), [("q", "v")])

    share = op.divide(("q", "v"), pack_of((70, both, None), (3, only_v, None)), CPU)

    (run,) = share.runs
    group = run.group
    assert group.spans.tolist() == [[0, 0, 70, 0, 0], [2, 0, 70, 70, 1], [3, 70, 73, 140, 1]]
    tiles = [[0, 0, 64, 0, 0, 0], [0, 64, 6, 64, 64, 0]]
    assert group.tiles.tolist() == [*tiles, [2, 0, 64, 70, 0, 1], [2, 64, 6, 134, 64, 1], [3, 70, 3, 140, 0, 1]]
    joins = [[0, 64, 0, 2, 0, 0, 2, 70, 0, 0], [64, 6, 64, 2, 0, 64, 2, 134, 0, 0]]
    assert group.joins.tolist() == [*joins, [70, 3, 0, 1, 3, 140, 0, 0, 0, 0]]
    assert (group.num_rows, group.num_siblings) == (143, 2)
    entries = entries_of(share)
    assert [bool(entry["rank"]) for entry in entries] == [True, False, True, True]
    assert entries[3]["a"] == only_v.sites["v"].a_RD.data_ptr()


def test_siblings_of_several_classes_have_runs_in_an_order_that_no_packmate_changes() -> None:
    mixed = adapter(LoraConfig(rank=40, alpha=4, rank_pattern=(("v", 8),)), "q", "v")
    other = adapter(LoraConfig(rank=40, alpha=4), "q", "v")
    op = SegmentedLora("tiled", list(SHAPES), [("q", "v")])

    runs = op.divide(("q", "v"), pack_of((5, other, None), (6, mixed, None)), CPU).runs

    assert [run.group.kind.width for run in runs] == [16, 64]
    assert [run.group.spans[:, 0].tolist() for run in runs] == [[3], [0, 1, 2]]


def test_sibling_without_the_others_has_a_plan_of_its_own() -> None:
    part = adapter(LoraConfig(rank=8, alpha=4), "q", "v")
    pack, op = pack_of((5, part, None)), SegmentedLora("tiled", list(SHAPES), [("q", "v")])

    (run,) = op.divide(("v",), pack, CPU).runs

    assert run.group.spans.tolist() == [[0, 0, 5, 0, 0]]
    assert run.entries.numpy().reshape(-1).view(ENTRY)["a"] == part.sites["v"].a_RD.data_ptr()
    assert op.divide(("v",), pack, CPU).runs[0] is run


def test_linear_without_adapters_has_no_share() -> None:
    only_q = pack_of((5, adapter(LoraConfig(rank=8, alpha=1), "q"), None))
    op = SegmentedLora("tiled", list(SHAPES))

    assert op.divide(("v",), only_q, CPU).is_empty
    assert op.divide(("q",), replace(only_q, segments=()), CPU).is_empty
    assert not op.divide(("q",), only_q, CPU).is_empty


def test_pass_is_planned_once_and_copies_with_other_segments_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = pack_of((5, adapter(LoraConfig(rank=8, alpha=1), "q", "v"), None))
    op = SegmentedLora("tiled", list(SHAPES))
    planned: list[int] = []
    original = op.plan
    monkeypatch.setattr(op, "plan", lambda *arguments: planned.append(1) or original(*arguments))

    op.divide(("q",), pack, CPU)
    op.divide(("v",), replace(pack, is_checkpointed=True), CPU)
    assert len(planned) == 1

    pooled = replace(pack, segments=(replace(pack.segments[0], stop=1),))
    (run,) = op.divide(("q",), pooled, CPU).runs
    assert run.group.num_rows == 1
    assert len(planned) == 2


def test_plan_does_not_keep_an_adapter_alive() -> None:
    part = adapter(LoraConfig(rank=8, alpha=1), "q")
    pack, op = pack_of((5, part, None)), SegmentedLora("tiled", list(SHAPES))
    op.divide(("q",), pack, CPU)
    is_alive = weakref.ref(part)

    del part, pack

    assert is_alive() is None


def test_loop_gets_all_segments() -> None:
    pack = pack_of((5, adapter(LoraConfig(rank=8, alpha=1), "q"), None))

    share = SegmentedLora("loop", list(SHAPES)).divide(("q",), pack, CPU)

    assert [piece.start for piece in share.pieces[0]] == [0]
    assert share.runs == ()


def test_keys_of_modules_generate_the_masks_of_a_cpu() -> None:
    for module, key in zip(SHAPES, KEY.philox_keys(list(SHAPES)), strict=True):
        words = np.asarray(np.random.Philox(key=key).random_raw(6), np.uint64)

        assert KEY.keep_TD(module, torch.empty(3, 8)).flatten().tolist() == (words.view(np.uint16) < 49152).tolist()

"""Token files must match their format exactly. Order and slices depend on the job alone."""

import json
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_core.data.token_dataset import TokenDataset, cut_slices, rows_of_step
from lora_core.errors import BadDataset, LoraCoreError, UnsafeFile
from tests.lora_core.scenarios import dataset

GOOD = {
    "input_ids": np.array([5, 6, 7, 8, 9], np.int32),
    "loss_mask": np.array([0, 1, 0, 0, 1], np.uint8),
    "row_offsets": np.array([0, 2, 5], np.int64),
}


def write(path: Path, **changes) -> Path:
    tensors = {name: tensor for name, tensor in (GOOD | changes).items() if tensor is not None}
    save_file(tensors, path)
    return path


def test_a_token_file_is_loaded_row_by_row(tmp_path):
    loaded = TokenDataset.load(write(tmp_path / "d.safetensors"))
    assert (loaded.num_rows, loaded.num_tokens, loaded.num_supervised_tokens) == (2, 5, 2)
    assert [part.tolist() for part in loaded.row(1)] == [[7, 8, 9], [0, 0, 1]]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_mask": None},
        {"extra": np.zeros(1, np.int32)},
        {"input_ids": np.array([5, 6, 7, 8, 9], np.int64)},
        {"input_ids": np.array([5, -6, 7, 8, 9], np.int32)},
        {"loss_mask": np.array([1, 1, 0, 0, 1], np.uint8)},
        {"loss_mask": np.array([0, 2, 0, 0, 1], np.uint8)},
        {"loss_mask": np.array([0, 1, 0, 0, 0], np.uint8)},
        {"loss_mask": np.array([0, 1], np.uint8)},
        {"row_offsets": np.array([0, 2, 4], np.int64)},
        {"row_offsets": np.array([0, 1, 5], np.int64)},
        {"row_offsets": np.array([0], np.int64)},
        {"row_offsets": np.array([0, 9, 5], np.int64)},
    ],
)
def test_token_file_with_any_defect_is_rejected(tmp_path, changes):
    with pytest.raises(BadDataset):
        TokenDataset.load(write(tmp_path / "d.safetensors", **changes))


def hostile_files(tmp_path: Path) -> dict[str, Path]:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    many = json.dumps({str(index): entry for index in range(20_001)}).encode()
    contents = {
        "huge header": (9 * 2**20).to_bytes(8, "little") + b"{}",
        "many tensors": len(many).to_bytes(8, "little") + many,
        "no json": (4).to_bytes(8, "little") + b"nope",
        "deep json": (200_000).to_bytes(8, "little") + b"[" * 200_000,
        "a list": (2).to_bytes(8, "little") + b"[]",
        "empty": b"",
        "pickle": b"\x80\x04\x95" + bytes(64),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


def test_hostile_safetensors_are_rejected_before_parsing(tmp_path):
    for name, path in hostile_files(tmp_path).items():
        with pytest.raises(UnsafeFile) as caught:
            TokenDataset.load(path)
        assert caught.value.remedy, name


def test_each_epoch_is_a_permutation_and_batches_span_epochs():
    rows = [row for step in range(7) for row in rows_of_step(num_rows=7, batch_size=3, seed=5, step=step)]
    epochs = [rows[0:7], rows[7:14], rows[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_and_never_changes():
    assert rows_of_step(num_rows=10, batch_size=10, seed=1, step=0) == [2, 6, 7, 1, 0, 5, 4, 3, 9, 8]
    assert rows_of_step(num_rows=10, batch_size=10, seed=2, step=0) != rows_of_step(
        num_rows=10, batch_size=10, seed=1, step=0
    )


def test_slices_keep_order_and_limit_and_a_long_row_is_alone():
    lengths = dataset(0, [30, 20, 90, 10, 40, 50]).row_lengths()
    assert cut_slices([0, 1, 2, 3, 4, 5], lengths, slice_tokens=50) == [(0, 1), (2,), (3, 4), (5,)]
    assert cut_slices([4], lengths, slice_tokens=1) == [(4,)]
    assert cut_slices([], lengths, slice_tokens=50) == []


def test_slices_are_as_few_and_as_equal_as_possible():
    lengths = dataset(0, [40, 40, 10, 30, 30, 20, 90]).row_lengths()
    assert cut_slices([0, 1, 2, 3, 4, 5], lengths, slice_tokens=150) == [(0, 1, 2), (3, 4, 5)], "90 + 80, not 150 + 20"
    assert cut_slices([0, 1, 2], lengths, slice_tokens=80) == [(0,), (1, 2)], "40 + 50, not 80 + 10"
    assert cut_slices([0, 1, 2], lengths, slice_tokens=90) == [(0, 1, 2)]
    assert cut_slices([6, 2, 2], lengths, slice_tokens=80) == [(6,), (2, 2)], "a long row does not raise the limit"


@given(sizes=st.lists(st.integers(2, 60), max_size=8), slice_tokens=st.integers(1, 120))
def test_no_other_cut_has_fewer_slices_or_a_smaller_largest_slice(sizes: list[int], slice_tokens: int):
    rows = list(range(len(sizes)))
    cut = cut_slices(rows, np.array(sizes, np.int64), slice_tokens=slice_tokens)
    assert [row for part in cut for row in part] == rows

    def largest(parts: list[tuple[int, ...]]) -> int:
        return max((sum(sizes[row] for row in part) for part in parts if len(part) > 1), default=0)

    def is_allowed(parts: list[tuple[int, ...]]) -> bool:
        return largest(parts) <= slice_tokens

    others = [
        [tuple(rows[start:stop]) for start, stop in pairwise([0, *cuts, len(rows)])]
        for number in range(len(rows))
        for cuts in combinations(range(1, len(rows)), number)
    ]
    assert is_allowed(cut)
    allowed = list(filter(is_allowed, others))
    assert len(cut) == min(map(len, allowed), default=0)
    assert largest(cut) == min((largest(parts) for parts in allowed if len(parts) == len(cut)), default=0)


@pytest.mark.parametrize("module", ["config", "errors", "events", "data.token_dataset", "engine.fair_queue"])
def test_modules_that_other_packages_import_need_no_torch(module):
    program = f"import sys, lora_core.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_error_has_a_code_a_sentence_and_a_remedy(tmp_path):
    with pytest.raises(LoraCoreError) as caught:
        TokenDataset.load(tmp_path / "missing")
    assert caught.value.code == "unsafe_file"
    assert str(caught.value).endswith(".")
    assert caught.value.remedy.endswith(".")

"""Several arrays travel in one buffer and arrive as they were."""

import numpy as np
import torch

from lora_core.runtime.transfers import ALIGNMENT_BYTES, NamedVectors, download, joined, parted, upload

ARRAYS = (
    np.arange(7, dtype=np.int64)[None],
    np.array([True, False, True]),
    np.zeros((0, 4), np.float32),
    np.arange(12, dtype=np.float32).reshape(4, 3).T,
    np.array([1, -2], np.int32),
)


def test_arrays_of_any_type_and_order_arrive_as_they_were_at_aligned_places() -> None:
    tensors = parted(torch.from_numpy(joined(ARRAYS)), ARRAYS)

    for array, tensor in zip(ARRAYS, tensors, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.storage_offset() * tensor.itemsize % ALIGNMENT_BYTES == 0


def test_a_cpu_reads_the_arrays_in_place() -> None:
    (tensor,) = upload([ARRAYS[0]], "cpu")

    assert tensor.data_ptr() == ARRAYS[0].ctypes.data
    assert upload([], "meta") == []


def test_numbers_are_read_exactly() -> None:
    number, flags = torch.tensor([0.1, -float("inf")]), torch.tensor([[True, False]])

    read = download([number, flags])

    assert read[0].tolist() == [float(np.float32(0.1)), -float("inf")]
    assert read[1].tolist() == [[1.0, 0.0]]
    assert download([]) == []


def test_lasting_copies_keep_their_values_and_others_take_no_memory() -> None:
    vector = torch.arange(6.0)[2:5]
    vectors = NamedVectors(vectors={"it": vector})

    lasting, shared = vectors.lasting().on_host()["it"], vectors.on_host()["it"]
    vector.zero_()

    assert lasting.tolist() == [2.0, 3.0, 4.0]
    assert shared.data_ptr() == vector.data_ptr()

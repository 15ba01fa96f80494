"""Stored hidden states are returned bit for bit or not at all, whatever happens to the disk."""

import gc
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lora_core.engine import prefix_cache
from lora_core.engine.prefix_cache import PrefixStore

KEYS = [bytes([number]) * 32 for number in range(4)]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def states(request: pytest.FixtureRequest) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 64).to(request.param) for _ in KEYS]


def on_disk(folder: Path, **options: int) -> PrefixStore:
    return PrefixStore(memory_bytes=0, folder=folder, **({"disk_bytes": 1 << 20} | options))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*") if path.is_file()]


def taken(store: PrefixStore, key: bytes, job: str) -> torch.Tensor:
    state = store.take(key, job)
    assert state is not None
    return state


def test_states_beyond_the_memory_budget_go_to_disk_with_the_same_bits(tmp_path, states) -> None:
    store = PrefixStore(memory_bytes=2 * states[0].nbytes, disk_bytes=1 << 20, folder=tmp_path)

    for key, state in zip(KEYS, states, strict=True):
        store.keep(key, state, "job")

    assert (store.memory_bytes, store.disk_bytes) == (2 * states[0].nbytes, 2 * states[0].nbytes)
    assert len(files(tmp_path)) == 2
    for key, state in zip(KEYS, states, strict=True):
        found = store.take(key, "job")
        assert found is not None
        assert found.dtype == state.dtype
        assert torch.equal(found, state)


def test_states_evicted_from_memory_for_another_job_go_to_disk(tmp_path, states) -> None:
    store = PrefixStore(memory_bytes=2 * states[0].nbytes, disk_bytes=1 << 20, folder=tmp_path)
    store.keep(KEYS[0], states[0], "first")
    store.keep(KEYS[1], states[1], "first")

    store.keep(KEYS[2], states[2], "second")

    assert len(files(tmp_path)) == 1
    for key, state in zip(KEYS[:3], states, strict=False):
        assert torch.equal(taken(store, key, "first"), state)


def test_part_of_a_larger_tensor_is_stored_without_the_rest(states) -> None:
    whole = torch.cat(states)
    store = PrefixStore(memory_bytes=1 << 20, disk_bytes=0, folder=None)

    store.keep(KEYS[0], whole[:5], "job")
    whole.zero_()

    kept = store.take(KEYS[0], "job")
    assert kept is not None
    assert kept.untyped_storage().nbytes() == kept.nbytes
    assert torch.equal(kept, states[0])


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "gone"])
def test_damaged_file_is_detected_and_removed(tmp_path, states, damage) -> None:
    store = on_disk(tmp_path)
    store.keep(KEYS[0], states[0], "job")
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.write_bytes({"flipped": content[:-1] + bytes([content[-1] ^ 1]), "short": content[:-4]}.get(damage, b""))
    if damage == "gone":
        path.unlink()

    assert store.take(KEYS[0], "job") is None

    assert store.num_damaged == 1
    assert KEYS[0] not in store
    assert files(tmp_path) == []
    store.keep(KEYS[0], states[0], "job")
    assert torch.equal(taken(store, KEYS[0], "job"), states[0])


def test_nearly_full_disk_and_failing_disk_store_nothing(tmp_path, states, monkeypatch) -> None:
    usage = namedtuple("usage", "free")
    store = on_disk(tmp_path)
    monkeypatch.setattr(prefix_cache.shutil, "disk_usage", lambda _: usage(prefix_cache.LEAST_FREE_BYTES - 1))
    store.keep(KEYS[0], states[0], "job")
    monkeypatch.undo()
    shutil.rmtree(next(tmp_path.iterdir()))
    store.keep(KEYS[1], states[1], "job")

    assert [key in store for key in KEYS[:2]] == [False, False]
    assert store.disk_bytes == 0


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
def test_failed_copy_leaves_no_entry_without_its_states(states, monkeypatch, raised) -> None:
    store = PrefixStore(memory_bytes=2 * states[0].nbytes, disk_bytes=0, folder=None)
    store.keep(KEYS[0], states[0], "gone")
    store.keep(KEYS[1], states[1], "gone")
    store.disown("gone")

    def fail(*_arguments, **_options):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", fail)
        with pytest.raises(raised):
            store.keep(KEYS[2], states[2], "job")

    assert store.take(KEYS[2], "job") is None
    assert store.take(KEYS[0], "job") is None  # it was evicted for the new entry
    assert len(store._tensors) * states[0].nbytes == store.memory_bytes == states[0].nbytes
    for key, state in zip(KEYS[1:3], states[1:3], strict=True):
        store.keep(key, state, "job")
        assert torch.equal(taken(store, key, "job"), state)


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("has_victims", [False, True])
def test_partly_written_file_is_removed(tmp_path, states, monkeypatch, raised, has_victims) -> None:
    num_bytes = 2 * states[0].nbytes if has_victims else 0
    store = PrefixStore(memory_bytes=num_bytes, disk_bytes=1 << 20, folder=tmp_path)
    if has_victims:
        store.keep(KEYS[0], states[0], "gone")
        store.keep(KEYS[1], states[1], "gone")
        store.disown("gone")

    def fail(path, *_arguments):
        path.write_bytes(b"half")
        raise raised

    wide = torch.cat([states[2], states[2]])
    with monkeypatch.context() as patch:
        patch.setattr(prefix_cache, "_written", fail)
        with pytest.raises(raised):
            store.keep(KEYS[2], wide, "job")

    assert files(tmp_path) == []
    assert store.disk_bytes == 0
    assert len(store._tensors) == store.memory_bytes // wide.nbytes == int(has_victims)
    for key in KEYS[:2]:
        assert store.take(key, "job") is None
    store.keep(KEYS[2], wide, "job")
    assert torch.equal(taken(store, KEYS[2], "job"), wide)


def test_ctrl_c_during_a_copy_waits_until_the_store_is_consistent(states, monkeypatch) -> None:
    store, copy = PrefixStore(memory_bytes=1 << 20, disk_bytes=0, folder=None), torch.Tensor.to

    def pressed(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return copy(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", pressed)
        with pytest.raises(KeyboardInterrupt):
            store.keep(KEYS[0], states[0], "job")

    assert torch.equal(taken(store, KEYS[0], "job"), states[0])


def test_disk_usage_never_exceeds_its_budget(tmp_path, states) -> None:
    store = on_disk(tmp_path, disk_bytes=2 * states[0].nbytes)
    for key, state in zip(KEYS, states, strict=True):
        store.keep(key, state, "job")
    assert sum(path.stat().st_size for path in files(tmp_path)) == 2 * states[0].nbytes

    store.disown("job")
    store.keep(KEYS[3], states[3], "other")

    assert KEYS[3] in store
    assert sum(path.stat().st_size for path in files(tmp_path)) == 2 * states[0].nbytes


def test_folder_is_deleted_with_the_store(tmp_path, states) -> None:
    store = on_disk(tmp_path)
    store.keep(KEYS[0], states[0], "job")
    assert files(tmp_path)

    del store
    gc.collect()

    assert list(tmp_path.iterdir()) == []

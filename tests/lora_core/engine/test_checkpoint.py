"""A checkpoint is complete, names what it belongs to, and is rejected if it is inconsistent."""

import errno
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadCheckpoint, OutOfMemory
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    numbers,
    starts,
    submissions,
    trained_in_full,
)
from tests.services.small_disk import small_disk

JOB = Submission(config=config(num_steps=2), train=dataset(1, [10, 12, 8]))


@pytest.fixture
def engine(load) -> Engine:
    return Engine(load("llama"), EngineConfig())


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    admit(engine, "job", JOB)
    while not engine.idle:
        engine.tick()
    engine.save_checkpoint("job", tmp_path / "saved")
    engine.evict("job")
    return tmp_path / "saved"


def test_a_checkpoint_is_two_files_and_no_pickle(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["row.safetensors", "state.json"]
    assert load_file(saved / "row.safetensors").keys() == {"p", "m", "v"}
    state = json.loads((saved / "state.json").read_text())
    assert (state["progress"]["step"], state["epoch"], state["position_in_epoch"]) == (2, 1, 1)


def test_a_checkpoint_never_replaces_a_directory(engine, saved):
    admit(engine, "job", JOB)
    with pytest.raises(FileExistsError):
        engine.save_checkpoint("job", saved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "job",
    [
        submissions("llama")["dora"],
        starts()["pissa"],
        numbers()["adafactor"],
        numbers()["early_best"],
        *trained_in_full("llama").values(),
    ],
    ids=lambda job: str(job.config.seed),
)
def test_snapshots_written_after_the_job_has_left_have_the_bytes_of_their_step(load, tmp_path, job, dtype):
    engine = Engine(load("llama", dtype), EngineConfig())
    admit(engine, "job", job)
    while engine.progress("job")[0] < 1:
        engine.tick()
    engine.save_checkpoint("job", tmp_path / "saved")
    report = engine.export("job", tmp_path / "exported", base_name="tiny", base_revision="c0ffee", has_evidence=False)
    checkpoint = engine.checkpoint_snapshot("job")
    adapter = engine.adapter_snapshot("job", base_name="tiny", base_revision="c0ffee")
    while engine.progress("job")[0] < 2:
        engine.tick()
    engine.save_checkpoint("job", tmp_path / "later")
    engine.evict("job")

    checkpoint.write(tmp_path / "saved from the snapshot")
    assert adapter.write(tmp_path / "exported from the snapshot") == report

    for name in ("saved", "exported"):
        assert content_of(tmp_path / f"{name} from the snapshot") == content_of(tmp_path / name)
    assert content_of(tmp_path / "later") != content_of(tmp_path / "saved")


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_snapshot_that_does_not_fit_is_out_of_memory(engine, monkeypatch):
    admit(engine, "job", JOB)
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_: (_ for _ in ()).throw(MemoryError()))

    for snapshot in (engine.checkpoint_snapshot, lambda job: engine.adapter_snapshot(job, base_name="tiny")):
        with pytest.raises(OutOfMemory, match="the copy for its checkpoint"):
            snapshot("job")


def test_a_job_takes_as_much_memory_as_its_snapshots(load):
    for dtype in ("float32", "bfloat16"):
        engine = Engine(load("llama", dtype), EngineConfig())
        for name, job in submissions("llama").items():
            admit(engine, name, job)
            snapshots = engine.checkpoint_snapshot(name), engine.adapter_snapshot(name, base_name="tiny")
            taken = sum(vector.nbytes for each in snapshots for vector in each.vectors.on_host().values())
            assert taken <= engine.job(name).num_bytes, name


def test_a_failed_write_leaves_nothing_behind(engine, tmp_path, monkeypatch):
    admit(engine, "job", JOB)
    monkeypatch.setattr(
        "lora_core.engine.checkpoint.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        engine.save_checkpoint("job", tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_raises_os_error_leaves_no_file_and_keeps_the_job(engine, tmp_path):
    admit(engine, "job", JOB)
    with small_disk(tmp_path / "disk", 64 * 1024) as disk:
        with pytest.raises(OSError, match="No space left") as caught:
            engine.save_checkpoint("job", disk / "saved")
        assert caught.value.errno == errno.ENOSPC
        assert list(disk.iterdir()) == []
    engine.tick()
    engine.save_checkpoint("job", tmp_path / "saved")


def test_file_above_the_size_limit_raises_os_error_and_leaves_no_file(engine, tmp_path):
    admit(engine, "job", JOB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            engine.export("job", tmp_path / "adapter", base_name="tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_configuration_is_rejected(engine, saved):
    other = replace(JOB, config=replace(JOB.config, seed=99))
    with pytest.raises(BadCheckpoint, match="config_digest"):
        admit(engine, "job", other, resume_from=saved)
    assert engine.jobs() == ()


def test_checkpoint_of_other_data_is_rejected(engine, saved):
    with pytest.raises(BadCheckpoint, match="data_digest"):
        admit(engine, "job", replace(JOB, train=dataset(2, [10, 12, 8])), resume_from=saved)


def test_checkpoint_with_changed_weights_is_rejected(engine, saved):
    vectors = load_file(saved / "row.safetensors")
    vectors["p"][5] += 1
    save_file(vectors, saved / "row.safetensors")
    with pytest.raises(BadCheckpoint, match="digest"):
        admit(engine, "job", JOB, resume_from=saved)


def test_checkpoint_with_vectors_of_another_size_is_rejected(engine, saved):
    save_file({name: torch.zeros(7) for name in ("p", "m", "v")}, saved / "row.safetensors")
    with pytest.raises(BadCheckpoint, match="p, m, v of"):
        admit(engine, "job", JOB, resume_from=saved)


def test_checkpoint_without_its_best_weights_is_rejected(engine, tmp_path):
    job = numbers()["early_best"]
    admit(engine, "job", job)
    while engine.progress("job")[0] < 2:
        engine.tick()
    engine.save_checkpoint("job", tmp_path / "saved")
    engine.evict("job")
    vectors = load_file(tmp_path / "saved/row.safetensors")
    assert vectors.keys() == {"p", "m", "v", "best"}
    assert vectors["best"].any()

    save_file({name: vectors[name] for name in ("p", "m", "v")}, tmp_path / "saved/row.safetensors")
    with pytest.raises(BadCheckpoint, match="p, m, v, best"):
        admit(engine, "job", job, resume_from=tmp_path / "saved")


def test_checkpoint_of_an_older_format_is_rejected_by_its_number(engine, saved):
    state = json.loads((saved / "state.json").read_text())
    del state["progress"]["selection"]
    (saved / "state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(BadCheckpoint, match="format 2, but this version reads only format 4") as caught:
        admit(engine, "job", JOB, resume_from=saved)
    assert "the version of lora_core that wrote it" in caught.value.remedy


@pytest.mark.parametrize("name", ["parent_sha256", "base_digest"])
def test_checkpoint_without_parent_or_base_digest_is_rejected(engine, saved, name):
    state = json.loads((saved / "state.json").read_text())
    assert name in state
    del state[name]
    (saved / "state.json").write_text(json.dumps(state))

    with pytest.raises(BadCheckpoint, match=name):
        admit(engine, "job", JOB, resume_from=saved)


@pytest.mark.parametrize("name", ["state.json", "row.safetensors"])
def test_missing_or_truncated_checkpoint_file_is_rejected(engine, saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BadCheckpoint):
        admit(engine, "job", JOB, resume_from=saved)

    (saved / name).unlink()
    with pytest.raises(BadCheckpoint):
        admit(engine, "job", JOB, resume_from=saved)

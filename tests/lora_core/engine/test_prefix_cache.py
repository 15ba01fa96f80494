"""Invariant: cached prefix activations do not change results, and frozen lower layers run once per sequence.

The tests count rows that pass through linears. They measure no time.
"""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.base_model import patching
from lora_core.base_model.model import BaseModel, load_base
from lora_core.config import JobConfig, ObjectiveConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError
from lora_core.events import JobStepped
from tests.lora_core import classifiers
from tests.lora_core.runtime.dtypes import DTYPES
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    run_alone,
    run_elastically,
    state_bytes,
    submissions,
)
from tests.lora_core.test_families import save

AMPLE: dict[str, Any] = {"prefix_memory_bytes": 1 << 24}
ROOM_FOR_SOME = 6000
"""Bytes of a few short sequences."""


def top(job: JobConfig, *layers: int, **fields) -> JobConfig:
    return replace(job, lora=replace(job.lora, layers_to_transform=layers or (1,), **fields))


def upper_jobs() -> dict[str, Submission]:
    """Return jobs that adapt only the upper block, with dropout, noise, pairs, a trained head, and common rows."""
    dpo = ObjectiveConfig(kind="dpo", beta=0.5)
    shared = dataset(81, [22, 9, 31, 14])
    return {
        "dropped": Submission(
            config=top(config(rank=8, dropout=0.25, batch_size=3, seed=81, slice_tokens=40, evaluate_every_steps=1)),
            train=shared,
            valid=dataset(82, [12, 33, 5]),
        ),
        "noisy": Submission(
            config=replace(top(config(seed=82, evaluate_every_steps=2)), neftune_alpha=5.0),
            train=shared,
            valid=dataset(82, [12, 33, 5]),
        ),
        "pairs": Submission(
            config=top(config(seed=83, objective=dpo, evaluate_every_steps=2)),
            train=dataset(83, [9, 14, 31, 22, 5, 40]),
            valid=dataset(84, [12, 25]),
        ),
        "head": Submission(config=top(config(rank=2, seed=84), modules_to_save=("lm_head",)), train=shared),
        "tokens": Submission(
            config=top(config(rank=2, seed=85), trainable_token_indices=tuple(range(100, 200))), train=shared
        ),
    }


def is_as_alone(engine: Engine, name: str, base: BaseModel, job: Submission) -> bool:
    """Return whether a job ended with the bytes of a solo run without a cache."""
    return state_bytes(engine, name) == run_alone(base, job).vectors


def test_memory_shortage_while_caching_a_prefix_changes_no_byte(load, monkeypatch):
    base, job = load("llama"), upper_jobs()["dropped"]
    engine = Engine(base, EngineConfig(**AMPLE))
    admit(engine, "job", job)
    copies, copy = itertools.count(), torch.Tensor.to

    def limited(tensor, *arguments, **options):
        if options.get("copy") and next(copies) in (0, 3):
            raise torch.OutOfMemoryError("simulated")
        return copy(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", limited)
    while not engine.idle:
        engine.tick()

    assert next(copies) > 4
    assert engine.prefixes.reused_tokens > 0
    assert is_as_alone(engine, "job", base, job)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "kept", "num_lanes"),
    [
        ("llama", "memory", 1),
        ("llama", "disk", 3),
        ("llama", "some", 2),
        ("gpt2", "memory", 1),
        pytest.param("gpt2", "disk", 3, marks=pytest.mark.slow),
        pytest.param("gpt2", "some", 2, marks=pytest.mark.slow),
    ],
)
def test_prefix_cache_changes_no_bit_in_any_pack(load, tmp_path, family, dtype, kept, num_lanes):
    base = load(family, dtype)
    jobs = {name: submissions(family)[name] for name in ("plain", "top_only", "dora_dropout", "dpo")} | upper_jobs()
    kto = submissions(family)["kto"]
    jobs["kto"] = replace(kto, config=top(kto.config))
    alone = {name: run_alone(base, job) for name, job in jobs.items()}
    disk = {"prefix_folder": tmp_path}
    options = {
        "memory": AMPLE,
        "disk": disk | {"prefix_disk_bytes": 1 << 24, "checkpoint_blocks": "always"},
        "some": disk | {"prefix_memory_bytes": ROOM_FOR_SOME, "prefix_disk_bytes": ROOM_FOR_SOME},
    }[kept]

    packed = run_elastically(base, jobs, token_budget=512, seed=7, victim="none", num_lanes=num_lanes, **options)

    assert {name: packed[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefix_cache_changes_no_bit_of_a_job_alone(load, dtype):
    base = load("llama", dtype)
    for name, job in upper_jobs().items():
        is_same = run_alone(base, job, **AMPLE) == run_alone(base, job)
        assert is_same, name


@pytest.fixture
def rows_by_block(monkeypatch) -> Counter[str]:
    """Number of rows through one linear of each block of the tiny bases, including padding."""
    counted: Counter[str] = Counter()
    forward = patching.forward_linear

    def counting(linear, name, leaf, segment_op, x):
        for number in "01":
            if name.endswith((f"layers.{number}.self_attn.o_proj", f"h.{number}.attn.c_attn")):
                counted[number] += x.shape[-2]
        return forward(linear, name, leaf, segment_op, x)

    monkeypatch.setattr(patching, "forward_linear", counting)
    return counted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lower_blocks_run_only_in_the_first_epoch(rows_by_block, load, family, dtype):
    job = Submission(config=top(config(batch_size=2, num_steps=9)), train=dataset(1, [20, 28, 15, 17, 30, 18]))
    engine = Engine(load(family, dtype), EngineConfig(**AMPLE))
    admit(engine, "job", job)

    rows_by_block.clear()
    steps = [tick(engine, rows_by_block) for _ in range(9)]

    assert [lower > 0 for lower, _ in steps] == [True] * 3 + [False] * 6
    assert sum(lower for lower, _ in steps) == sum(upper for _, upper in steps[:3])
    assert all(upper for _, upper in steps)
    assert engine.prefixes.computed_tokens == 128
    assert engine.prefixes.reused_tokens == 2 * 128
    assert engine.prefixes.memory_bytes == 128 * 64 * (4 if dtype == "float32" else 2)


def tick(engine: Engine, rows_by_block: Counter[str]) -> tuple[int, int]:
    """Return the number of rows through the lower and the upper block in one step."""
    rows_by_block.clear()
    assert [type(event) for event in engine.tick()][:1] == [JobStepped]
    return rows_by_block["0"], rows_by_block["1"]


def test_common_rows_are_computed_once_for_all_jobs_and_both_dpo_passes(rows_by_block, load):
    train = dataset(1, [20, 28, 15, 17])
    plain = top(config(batch_size=4, num_steps=3))
    dpo = top(config(batch_size=2, num_steps=3, objective=ObjectiveConfig(kind="dpo")))
    engine = Engine(load("llama"), EngineConfig(**AMPLE))
    for name, job in {"one": plain, "other": replace(plain, seed=5), "dpo": dpo}.items():
        admit(engine, name, Submission(config=job, train=train))
    rows_by_block.clear()

    while not engine.idle:
        engine.tick()

    assert rows_by_block["0"] == 80
    assert rows_by_block["1"] == 3 * (3 * 80 + 80)
    assert engine.prefixes.computed_tokens == 80


def test_evaluations_reuse_the_cache_and_noisy_training_bypasses_it(rows_by_block, load):
    job = Submission(
        config=replace(top(config(batch_size=2, num_steps=4, evaluate_every_steps=1)), neftune_alpha=5.0),
        train=dataset(1, [16, 16]),
        valid=dataset(2, [24, 8]),
    )
    engine = Engine(load("llama"), EngineConfig(**AMPLE))
    admit(engine, "job", job)
    rows_by_block.clear()

    while not engine.idle:
        engine.tick()

    assert rows_by_block["0"] == 32 + 4 * 32
    assert rows_by_block["1"] == 5 * 32 + 4 * 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jobs_that_enter_at_different_blocks_share_rows_and_ticks(tmp_path, dtype):
    folder = save("llama", tmp_path, num_hidden_layers=4)
    base = load_base(folder, dtype=dtype, device="cpu")
    train = dataset(1, [20, 28, 15, 17])
    blocks = {"all": (0, 1, 2, 3), "three": (1, 2, 3), "two": (2, 3), "one": (3,), "gap": (1, 3)}
    jobs = {
        name: Submission(config=top(config(batch_size=3, num_steps=4, seed=seed), *numbers), train=train)
        for seed, (name, numbers) in enumerate(blocks.items())
    }
    engine = Engine(base, EngineConfig(**AMPLE))
    for name, job in jobs.items():
        admit(engine, name, job)

    while not engine.idle:
        engine.tick()

    assert engine.prefixes.computed_tokens == 3 * 80
    assert engine.prefixes.memory_bytes == 3 * 80 * 64 * base.dtype.itemsize
    for name, job in jobs.items():
        assert is_as_alone(engine, name, base, job), name


def once(job: JobConfig) -> JobConfig:
    return replace(job, num_steps=2)


@pytest.mark.parametrize(
    ("why", "job"),
    [
        ("each row is read once", once(top(config()))),
        ("the lowest block is adapted", top(config(num_steps=9), 0, 1)),
        ("embeddings are trained", top(config(num_steps=9), trainable_token_indices=(2,))),
        ("nothing may be kept", top(config(num_steps=9))),
    ],
)
def test_nothing_is_cached_if_it_could_not_be_reused(load, why, job):
    options = {} if why == "nothing may be kept" else AMPLE
    engine = Engine(load("llama"), EngineConfig(**options))
    admit(engine, "job", Submission(config=job, train=dataset(1, [20, 28, 15, 17])))

    while not engine.idle:
        engine.tick()

    assert (engine.prefixes.computed_tokens, engine.prefixes.memory_bytes) == (0, 0)


def test_damaged_files_are_recomputed_and_change_nothing(load, tmp_path):
    base = load("llama", "bfloat16")
    job = Submission(config=top(config(batch_size=2, num_steps=6)), train=dataset(1, [20, 28, 15, 17]))
    engine = Engine(base, EngineConfig(prefix_disk_bytes=1 << 24, prefix_folder=tmp_path))
    admit(engine, "job", job)
    engine.tick()
    engine.tick()
    paths = list(tmp_path.glob("*/*"))

    for path in paths:
        content = bytearray(path.read_bytes())
        content[7] ^= 64
        path.write_bytes(content)
    while not engine.idle:
        engine.tick()

    assert len(paths) == 4
    assert engine.prefixes.damaged_files == 4
    assert engine.prefixes.computed_tokens == 2 * 80
    assert is_as_alone(engine, "job", base, job)


def test_evicted_job_reuses_its_cached_rows_on_return(load):
    base = load("llama")
    job = Submission(config=top(config(batch_size=4, num_steps=6)), train=dataset(1, [20, 28, 15, 17]))
    engine = Engine(base, EngineConfig(**AMPLE))
    admit(engine, "job", job)
    engine.tick()
    engine.evict("job")

    admit(engine, "job", job)
    while not engine.idle:
        engine.tick()

    assert engine.prefixes.computed_tokens == 80
    assert is_as_alone(engine, "job", base, job)


def test_token_types_are_part_of_the_cache_key(tmp_path):
    base = classifiers.classifier("bert", tmp_path / "base")
    job = classifiers.classification_jobs(with_types=True)["three"]
    job = replace(job, config=top(replace(job.config, batch_size=6, num_steps=3)))
    assert job.train.token_types is not None
    other = replace(job, train=replace(job.train, token_types=1 - job.train.token_types))
    engine = Engine(base, EngineConfig(**AMPLE))

    for name, submission in {"job": job, "other": other}.items():
        admit(engine, name, submission)
    while not engine.idle:
        engine.tick()

    assert is_as_alone(engine, "job", base, job)
    assert is_as_alone(engine, "other", base, other)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_memory_bytes": -1},
        {"prefix_disk_bytes": -1},
        {"prefix_disk_bytes": 1},
        {"prefix_disk_bytes": 1, "prefix_folder": Path("nowhere/at/all")},
    ],
)
def test_invalid_cache_budget_is_rejected(options):
    with pytest.raises(ConfigError, match="prefix_") as caught:
        EngineConfig(**options)
    assert "must be" in caught.value.message

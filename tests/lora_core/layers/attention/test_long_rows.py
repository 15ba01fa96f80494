"""Packed equals solo and resumed equals uninterrupted with long rows.

Attention has a separate path for long rows, and the loss head processes more than one chunk of labels.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_core.base_model.model import BaseModel, load_base
from lora_core.config import ObjectiveConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event
from lora_core.layers.attention import packed as attention
from lora_core.layers.attention import tiled_cpu
from lora_core.layers.attention.packed import LONGEST_MATRIX
from lora_core.losses.chunked_cross_entropy import CHUNK_LABELS
from lora_core.packing.packed_batch import current_pack
from lora_core.runtime import cpu_lanes
from tests.lora_core.scenarios import (
    Outcome,
    Submission,
    admit,
    config,
    dataset,
    rename,
    run_alone,
    run_elastically,
    state_bytes,
)
from tests.tiny_models import HEADS, save

LONG = LONGEST_MATRIX + 77
SMALL = {"hidden_size": 64, "intermediate_size": 64}
UNHURRIED = {"job_tokens": 8192, "max_tick_seconds": 3600.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Matrices are small, so that attention dominates the cost of a tick of thousands of tokens."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return save("llama", tmp_path_factory.mktemp("long") / "base", max_position_embeddings=2048, **SMALL, **heads)


def sparsely_labeled(data: TokenDataset, every: int) -> TokenDataset:
    return replace(data, loss_mask=(data.loss_mask * (np.arange(len(data.loss_mask)) % every == 0)).astype(np.uint8))


def long_jobs() -> dict[str, Submission]:
    """Return jobs with rows on both sides of LONGEST_MATRIX.

    Two jobs have a row above it: one has three chunks of labels, the other no full chunk. One job has pairs with an
    answer on each side of the limit. The last one has short rows with many labels in one slice.
    """
    dpo = ObjectiveConfig(kind="dpo", beta=0.5)
    return {
        "labels": Submission(
            config=config(dropout=0.1, num_steps=2, seed=1, slice_tokens=2048), train=dataset(1, [LONG, 30])
        ),
        "few_labels": Submission(
            config=config(rank=3, targets=("q_proj", "v_proj"), batch_size=1, num_steps=2, seed=2),
            train=sparsely_labeled(dataset(2, [LONG + 60, 102]), 50),
        ),
        "pairs": Submission(
            config=config(batch_size=1, num_steps=1, seed=3, objective=dpo), train=dataset(3, [LONG, 40])
        ),
        "short": Submission(
            config=config(rank=2, batch_size=8, num_steps=3, seed=4, slice_tokens=2048),
            train=dataset(4, [97, 60, 110, 80, 101, 77, 93, 88]),
        ),
    }


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request, folder) -> BaseModel:
    torch.set_num_threads(1)
    return load_base(folder, dtype=request.param, device="cpu")


@pytest.fixture(scope="module")
def alone(base):
    return {name: run_alone(base, job) for name, job in long_jobs().items()}


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_packed_equals_solo_with_long_rows_and_many_labels(base, alone, monkeypatch, num_lanes):
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 64)
    packs = packs_of_the_fused_path(monkeypatch)

    jobs, together = long_jobs(), Engine(base, EngineConfig(token_budget=8192, num_lanes=num_lanes, **UNHURRIED))
    for name, job in jobs.items():
        admit(together, name, job)
    events: list[Event] = []
    while not together.idle:
        events += together.tick()
    packed = {
        name: Outcome(vectors=state_bytes(together, name), events=rename(events, name)) for name in together.jobs()
    }

    assert packed.keys() == alone.keys()
    for name, outcome in packed.items():
        assert outcome.events == alone[name].events, name
        assert outcome.vectors == alone[name].vectors, name
    assert {LONG, LONG + 60} <= {length for lengths in packs for length in lengths}
    assert any(len(lengths) > 2 and max(lengths) > LONGEST_MATRIX > min(lengths) for lengths in packs)


def packs_of_the_fused_path(monkeypatch) -> list[tuple[int, ...]]:
    """Return a list that collects the sequence lengths of each pack with a sequence on that path."""
    packs: list[tuple[int, ...]] = []
    fused = attention._attend_fused

    def noted(*arguments, **options):
        pack = current_pack()
        assert pack is not None
        packs.append(pack.sequence_lengths)
        return fused(*arguments, **options)

    monkeypatch.setattr(attention, "_attend_fused", noted)
    return packs


def test_resumed_equals_uninterrupted_with_long_rows_in_another_pack(base, alone, tmp_path):
    jobs = long_jobs()
    first = Engine(base, EngineConfig(token_budget=8192, **UNHURRIED))
    admit(first, "job", jobs["labels"])
    before: list[Event] = []
    while first.progress("job")[0] < 1:
        before += first.tick()
    first.save_checkpoint("job", tmp_path / "checkpoint")

    second = Engine(base, EngineConfig(token_budget=64))
    admit(second, "short", jobs["short"])
    admit(second, "job", jobs["labels"], resume_from=tmp_path / "checkpoint")
    while not second.idle:
        before += [event for event in second.tick() if event.job == "job"]

    assert state_bytes(second, "job") == alone["labels"].vectors
    assert rename(before, "job") == alone["labels"].events


def test_rows_have_the_numbers_of_labels_that_these_tests_need():
    jobs = long_jobs()
    assert int(jobs["labels"].train.row(0)[1].sum()) > 2 * CHUNK_LABELS
    assert int(jobs["short"].train.loss_mask.sum()) > CHUNK_LABELS
    assert max(jobs["short"].train.row_lengths()) < LONGEST_MATRIX


@pytest.fixture(scope="module")
def capped_folder(tmp_path_factory) -> Path:
    """A Gemma 2 base whose two layers cap scores. One of them has a window."""
    heads = HEADS | {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 100}
    options = heads | {"query_pre_attn_scalar": 1, "attn_logit_softcapping": 2.0, "max_position_embeddings": 2048}
    return save("gemma2", tmp_path_factory.mktemp("capped") / "base", **SMALL, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_capped_scores_and_windows_are_packed_and_resumed_bit_for_bit(capped_folder, dtype, tmp_path, monkeypatch):
    numbers = 1 << 18  # so that a row has many query chunks
    monkeypatch.setitem(tiled_cpu.STRIP_NUMBERS, "cpu", numbers)
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 64)
    base, jobs = load_base(capped_folder, dtype=dtype, device="cpu"), capped_jobs()
    alone = {name: run_alone(base, job, **UNHURRIED) for name, job in jobs.items()}
    first = Engine(base, EngineConfig(token_budget=4096, **UNHURRIED))
    admit(first, "long", jobs["long"])
    while first.progress("long")[0] < 1:
        first.tick()
    first.save_checkpoint("long", tmp_path / "checkpoint")

    packed = run_elastically(base, jobs, token_budget=4096, seed=1, victim="none", num_lanes=2, **UNHURRIED)
    second = Engine(base, EngineConfig(token_budget=4096, **UNHURRIED))
    admit(second, "middling", jobs["middling"])
    admit(second, "long", jobs["long"], resume_from=tmp_path / "checkpoint")
    while not second.idle:
        second.tick()

    assert second.invariance == "bitwise"
    assert packed == alone
    assert state_bytes(second, "long") == alone["long"].vectors


def capped_jobs() -> dict[str, Submission]:
    """Return jobs whose rows have one, a few and many query chunks."""
    return {
        "long": Submission(
            config=config(dropout=0.1, num_steps=2, seed=1, slice_tokens=2048), train=dataset(1, [LONG, 30])
        ),
        "middling": Submission(config=config(rank=3, num_steps=3, seed=2), train=dataset(2, [300, 450, 511])),
        "short": Submission(config=config(rank=2, num_steps=3, seed=3), train=dataset(3, [9, 41, 77])),
    }

"""Rotary factors that depend on sequence length: each sequence gets its own factors, whatever else is in a pass.

The tiny bases have a pretraining length of 64 tokens. Jobs have shorter, longer and equally long rows.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.base_model.model import BaseModel, load_base
from lora_core.config import JobConfig, ObjectiveConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import UnsupportedModel
from lora_core.forward.generation import Prompts
from lora_core.forward.language_model import hidden_states
from lora_core.packing.packed_batch import SliceInput, build_pack
from tests.lora_core.scenarios import VOCAB, Submission, admit, config, dataset, run_alone, run_elastically
from tests.tiny_models import HEADS, save

BOUND = 64


def longrope(num_factors: int, **fields: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * index for index in range(num_factors)],
        "long_factor": [2.0 + 1.5 * index for index in range(num_factors)],
        "original_max_position_embeddings": BOUND,
        **fields,
    }


PHI3: dict[str, Any] = {"original_max_position_embeddings": BOUND, "rope_parameters": longrope(8)}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", PHI3),
    "partial rotary embeddings": ("phi3", PHI3 | {"rope_parameters": longrope(6, partial_rotary_factor=0.75)}),
    "factors per layer type": (
        "gemma3_text",
        HEADS
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 512,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": longrope(8, factor=4.0),
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("longrope")
    return {
        name: save(family, root / str(number), **options)
        for number, (name, (family, options)) in enumerate(BASES.items())
    }


def top(job: JobConfig) -> JobConfig:
    return replace(job, lora=replace(job.lora, layers_to_transform=(1,)))


def jobs() -> dict[str, Submission]:
    """Return jobs with short rows only, short and long rows, pairs, rated answers, and an adapter on the top block."""
    dpo, kto = ObjectiveConfig(kind="dpo", beta=0.5), ObjectiveConfig(kind="kto", beta=0.4)
    rated = replace(dataset(5, [30, 80, 65, 12]), labels=np.array([1, 0, 1, 0], np.float32))
    return {
        "short": Submission(config=config(seed=1, num_steps=3), train=dataset(1, [20, 33, 15, BOUND])),
        "mixed": Submission(
            config=config(seed=2, num_steps=3, dropout=0.1, slice_tokens=120, evaluate_every_steps=2),
            train=dataset(2, [100, 12, BOUND, BOUND + 1, 70]),
            valid=dataset(12, [90, 8]),
        ),
        "pairs": Submission(
            config=config(seed=3, num_steps=2, slice_tokens=100, objective=dpo), train=dataset(3, [66, 30, 20, 90])
        ),
        "top": Submission(
            config=top(config(seed=4, num_steps=4, evaluate_every_steps=2)),
            train=dataset(4, [70, 31, BOUND, 9]),
            valid=dataset(14, [25, 75]),
        ),
        "rated": Submission(config=config(seed=5, num_steps=2, slice_tokens=90, objective=kto), train=rated),
    }


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_packed_equals_solo_with_packmates_of_any_length(folders, dtype, num_lanes):
    base = load_base(folders["phi3"], dtype=dtype, device="cpu")
    alone = {name: run_alone(base, job) for name, job in jobs().items()}
    blocks = "always" if num_lanes == 2 else "auto"

    packed = run_elastically(
        base, jobs(), token_budget=2048, seed=3, victim="none", num_lanes=num_lanes, checkpoint_blocks=blocks
    )

    assert {name: packed[name] == alone[name] for name in alone} == dict.fromkeys(alone, True)


def sequences(*lengths: int) -> list[np.ndarray]:
    numbers = np.random.default_rng(8)
    return [numbers.integers(1, VOCAB, length, dtype=np.int32) for length in lengths]


def packed_states(base: BaseModel, rows: list[np.ndarray]) -> list[Tensor]:
    engine = Engine(base, EngineConfig())
    admit(engine, "any", Submission(config=config(), train=dataset(1, [5])))
    pairs = tuple((row, np.zeros(len(row), np.uint8)) for row in rows)
    part = SliceInput(adapter=engine._jobs["any"].adapter, sequences=pairs, label_weight=0.0, dropout=None)
    pack = build_pack([part], device="cpu")
    with torch.no_grad():
        return list(hidden_states(base, pack).split(list(pack.sequence_lengths)))[: len(rows)]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("lengths", [(20, BOUND, 100, BOUND + 1, 7), (80, 90), (30, 12)], ids=["both", "long", "short"])
def test_packed_sequence_has_the_states_of_transformers_alone(folders, kind, lengths):
    base = load_base(folders[kind], dtype="float32", device="cpu")
    rows = sequences(*lengths)

    found = packed_states(base, rows)

    with base.untouched() as model, torch.no_grad():
        for row, states_SD in zip(rows, found, strict=True):
            expected = model.base_model(input_ids=torch.from_numpy(row).long()[None], use_cache=False)
            torch.testing.assert_close(states_SD, expected.last_hidden_state[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_pass_of_a_pack_writes_nothing_to_the_base(folders, kind):
    base = load_base(folders[kind], dtype="float32", device="cpu")
    packed_states(base, sequences(7))
    before = {name: buffer._version for name, buffer in base.model.named_buffers()}

    packed_states(base, sequences(100, 20))

    assert any("inv_freq" in name for name in before)
    assert {name: buffer._version for name, buffer in base.model.named_buffers()} == before


def greedy(base: BaseModel, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the answer of transformers, which recomputes everything for each token."""
    ids = list(prompt)
    with base.untouched() as model, torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_answer_changes_its_factors_beyond_the_original_length(folders):
    base = load_base(folders["phi3"], dtype="float32", device="cpu")
    engine = Engine(base, EngineConfig())
    admit(engine, "untrained", Submission(config=config(), train=dataset(1, [5])))
    prompts = tuple(tuple(row.tolist()) for row in sequences(*range(BOUND - 6, BOUND + 2), 100, 9))

    generation = engine.generation({"untrained": Prompts(prompts=prompts, max_tokens=8)})
    while not generation.is_complete:
        generation.advance()

    assert generation.answers()["untrained"] == [greedy(base, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
    ids=["current format", "former format"],
)
def test_frequencies_that_depend_on_earlier_passes_are_rejected_by_name(tmp_path, options):
    save("llama", tmp_path, **options)

    with pytest.raises(UnsupportedModel, match=r"'llama'.*'dynamic'") as caught:
        load_base(tmp_path, dtype="float32", device="cpu")

    assert "rope_type 'default'" in caught.value.remedy

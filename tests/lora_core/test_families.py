"""Model families built on the attention interface of transformers can be packed. Others are rejected by name.

Each base is a tiny random model. It trains with a packmate, PEFT serves the export, and the result equals a solo run.
"""

import re

import pytest
from transformers import AutoConfig

from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import UnsupportedModel
from lora_core.peft_format.verify import verify_export
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    run_alone,
    run_elastically,
    state_bytes,
)
from tests.tiny_models import COMMON, HEADS, save

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_packed_as_alone_and_peft_serves_its_adapter(tmp_path, family):
    base = load_base(save(family, tmp_path / "base", **FAMILIES[family]), dtype="float32", device="cpu")
    jobs = {
        "job": Submission(config=config(num_steps=3, dropout=0.1), train=dataset(1, [20, 33, 15])),
        "mate": Submission(config=config(num_steps=3, rank=2), train=dataset(2, [9, 41])),
    }
    engine = Engine(base, EngineConfig())
    for name, job in jobs.items():
        admit(engine, name, job)
    while not engine.idle:
        engine.tick()
    engine.export("job", tmp_path / "adapter", base_name="tiny")

    verdict = verify_export(base, tmp_path / "adapter")

    assert engine.invariance == "bitwise"
    for name, job in jobs.items():
        assert state_bytes(engine, name) == run_alone(base, job).vectors, name
    assert verdict.passed, verdict
    assert verdict.max_abs_effect > 10 * verdict.tolerance


@pytest.mark.parametrize("family", ["gemma2", "phi", "gpt_neox"])
def test_family_trains_packed_as_alone_in_bfloat16(tmp_path, family):
    """Special cases: capped scores and windows, partial rotary embeddings, attention parallel to the feed-forward."""
    base = load_base(save(family, tmp_path / "base", **FAMILIES[family]), dtype="bfloat16", device="cpu")
    jobs = {
        "job": Submission(config=config(num_steps=3, dropout=0.1, slice_tokens=40), train=dataset(1, [20, 33, 15])),
        "mate": Submission(config=config(num_steps=3, rank=2), train=dataset(2, [9, 41])),
        "large": Submission(config=config(num_steps=2, batch_size=3, rank=3), train=dataset(3, [130, 77, 200])),
    }
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=4096, seed=1, victim="none", num_lanes=2)

    assert Engine(base, EngineConfig()).invariance == "bitwise"
    assert packed == alone


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", HEADS | {"num_experts": 4, "moe_intermediate_size": 64}),
        ("mamba", {"state_size": 8}),
        ("gpt_oss", HEADS | {"num_local_experts": 4}),
    ],
)
def test_mixture_of_experts_and_recurrent_models_are_rejected_by_name(tmp_path, family, options):
    AutoConfig.for_model(family, **(COMMON | options)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=family) as caught:
        load_base(tmp_path, dtype="float32", device="cpu")
    assert "dense decoder" in caught.value.remedy


TEXT = COMMON | HEADS
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
TOWERS = {
    "gemma3": ({"text_config": TEXT, "vision_config": TOWER}, "reads images (vision_config)"),
    "llava": ({"text_config": {"model_type": "llama"} | TEXT, "vision_config": TOWER}, "reads images (vision_config)"),
    "qwen2_audio": ({"text_config": {"model_type": "qwen2"} | TEXT}, "reads sound (audio_config)"),
    "gemma3n": ({}, "reads images (vision_config) and sound (audio_config)"),
}


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("family", TOWERS)
def test_multimodal_model_is_rejected_before_it_is_built(tmp_path, monkeypatch, family, task):
    options, reason = TOWERS[family]
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path)
    monkeypatch.setattr("lora_core.base_model.model.build_model", None)

    with pytest.raises(UnsupportedModel, match=re.escape(reason)) as caught:
        load_base(tmp_path, dtype="float32", device="cpu", task=task)

    assert repr(family) in str(caught.value)
    assert "'gemma3_text'" in caught.value.remedy


def test_encoder_is_rejected(tmp_path):
    base = load_base(save("bert", tmp_path / "base"), dtype="float32", device="cpu")
    with pytest.raises(UnsupportedModel, match="can't be packed"):
        Engine(base, EngineConfig())

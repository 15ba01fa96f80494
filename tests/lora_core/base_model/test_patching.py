"""Targets match those of PEFT, invalid targets are rejected by name, and detaching leaves no trace."""

import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from lora_core.base_model.patching import Attachment, choose_targets, find_linears
from lora_core.config import LoraConfig as OurConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadDataset, NoTargets
from tests.lora_core.exports import snapshot
from tests.lora_core.scenarios import VOCAB, Submission, admit, config, dataset, weights


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "wanted", ["all-linear", ("c_attn", "q_proj"), ("c_proj", "o_proj"), ("mlp.c_proj", "up_proj")]
)
@pytest.mark.filterwarnings("ignore")
def test_adapted_modules_equal_those_of_peft(load, family, wanted):
    base = load(family)
    if wanted != "all-linear":
        wanted = tuple(name for name in wanted if name.rpartition(".")[2].startswith("c_") == (family == "gpt2"))
    ours = [target.name for target in choose_targets(find_linears(base.model), lora(wanted))]

    peft_targets = wanted if isinstance(wanted, str) else list(wanted)
    adapted = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", target_modules=peft_targets))
    theirs = [name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)]

    assert ours == theirs


def lora(targets, **fields) -> OurConfig:
    return OurConfig(rank=4, alpha=8, target_modules=targets, **fields)


@pytest.mark.parametrize(
    ("family", "layers", "pattern"),
    [("llama", [1], r"model\.layers\.1\.(mlp|self_attn)\..*_proj"), ("gpt2", [0], r".*h\.0\.(attn|mlp)\.c_.*")],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_and_regular_expressions_select_the_modules_of_peft(load, family, layers, pattern):
    linears = find_linears(load(family).model)
    short = sorted({name.rpartition(".")[2] for name in linears})
    by_layer = [
        target.name for target in choose_targets(linears, lora("all-linear", layers_to_transform=tuple(layers)))
    ]
    by_pattern = [target.name for target in choose_targets(linears, lora(f"re:{pattern}"))]

    for peft in (LoraConfig(target_modules=short, layers_to_transform=layers), LoraConfig(target_modules=pattern)):
        adapted = get_peft_model(load(family).model, peft).get_base_model()
        theirs = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
        assert by_layer == by_pattern == theirs


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"targets": "re:.*w_proj"}, "w_proj"),
        ({"targets": r"re:((\w|\w\w|\.)+)+[XY]"}, "too long"),
        ({"targets": "all-linear", "layers_to_transform": (0, 2)}, "layers_to_transform contains 2"),
        ({"targets": ("q_proj",), "rank_pattern": (("k_proj", 4),)}, "'k_proj' in lora.rank_pattern"),
        ({"targets": ("q_proj",), "alpha_pattern": ((".*k_proj", 4.0),)}, "'.*k_proj' in lora.alpha_pattern"),
    ],
)
def test_patterns_without_a_match_or_with_excessive_runtime_are_rejected(load, fields, reason):
    with pytest.raises(NoTargets, match=re.escape(reason)):
        choose_targets(find_linears(load("llama").model), lora(**fields))


def test_dora_on_unreadable_weights_is_rejected_by_name(load):
    class Quantized(torch.nn.Linear):
        pass

    base = load("llama")
    base.model.get_submodule("model.layers.0.mlp.up_proj").__class__ = Quantized
    engine = Engine(base, EngineConfig())
    job = config(targets="up_proj")
    job = replace(job, lora=replace(job.lora, use_dora=True))
    with pytest.raises(NoTargets, match=r"use_dora.*layers\.0\.mlp\.up_proj"):
        admit(engine, "job", Submission(config=job, train=dataset(1, [10])))
    assert engine.jobs() == ()


@pytest.mark.parametrize("wanted", ["lm_head", "w_proj", ("q_proj", "nope"), ".*", "proj", "self_attn"])
def test_targets_without_a_match_are_rejected_with_the_existing_names(load, wanted):
    engine = Engine(load("llama"), EngineConfig())
    with pytest.raises(NoTargets) as caught:
        admit(engine, "job", Submission(config=config(targets=wanted), train=dataset(1, [10])))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in caught.value.remedy
    assert engine.jobs() == ()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_detaching_leaves_no_trace(load, family):
    base = load(family)
    before = snapshot(base)
    attachment = Attachment(base.model)
    assert snapshot(base) != before
    attachment.detach()
    assert snapshot(base) == before


def test_attached_model_outside_a_pack_computes_the_same_logits(load):
    base = load("llama")
    ids = torch.randint(VOCAB, (2, 20))
    before = base.model(input_ids=ids).logits
    Attachment(base.model)
    torch.testing.assert_close(base.model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_data_that_does_not_fit_the_base_model_is_rejected(load):
    engine = Engine(load("llama"), EngineConfig())
    with pytest.raises(BadDataset, match="300 tokens"):
        admit(engine, "job", Submission(config=config(), train=dataset(1, [300])))
    foreign = dataset(1, [10])
    foreign.input_ids[3] = VOCAB
    with pytest.raises(BadDataset, match=f"token ID {VOCAB}"):
        admit(engine, "job", Submission(config=config(), train=foreign))


def test_linear_with_a_custom_forward_gives_the_same_result(load):
    """Like a quantized or sharded linear, it computes its own matmul, and lora_core adds the adapter's part."""

    class Strange(torch.nn.Linear):
        pass

    job = Submission(config=config(dropout=0.1), train=dataset(1, [20, 33]))
    plain, strange = load("llama"), load("llama")
    for linear in find_linears(strange.model).values():
        linear.__class__ = Strange
    results = []
    for base in (plain, strange):
        engine = Engine(base, EngineConfig())
        admit(engine, "job", job)
        while not engine.idle:
            engine.tick()
        results.append(weights(engine, "job").clone())

    assert engine.invariance == "bitwise"
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)

"""A peft.LoraConfig is converted exactly, or rejected with the name of the unsupported field."""

from dataclasses import fields

import peft
import pytest

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from lora_core.layers.task_heads import Task
from lora_core.peft_format import config as from_peft
from lora_core.peft_format.config import lora_config_from


def test_supported_fields_are_converted():
    config = peft.LoraConfig(
        r=12,
        lora_alpha=24,
        lora_dropout=0.1,
        target_modules=["v_proj", "q_proj"],
        use_rslora=True,
        use_dora=True,
        rank_pattern={"q_proj": 4},
        alpha_pattern={r"layers\.0\..*": 8},
        layers_to_transform=[0, 1],
        modules_to_save=["lm_head"],
        trainable_token_indices=[7, 3],
        task_type="CAUSAL_LM",
    )

    assert lora_config_from(config) == LoraConfig(
        rank=12,
        alpha=24,
        dropout=0.1,
        target_modules=("q_proj", "v_proj"),
        use_rslora=True,
        use_dora=True,
        rank_pattern=(("q_proj", 4),),
        alpha_pattern=((r"layers\.0\..*", 8),),
        layers_to_transform=(0, 1),
        modules_to_save=("lm_head",),
        trainable_token_indices=(7, 3),
    )
    assert lora_config_from(peft.LoraConfig(target_modules="all-linear")).target_modules == "all-linear"


def test_a_string_is_a_regular_expression_as_in_peft():
    assert lora_config_from(peft.LoraConfig(target_modules=r".*\.q_proj")).target_modules == r"re:.*\.q_proj"
    assert lora_config_from(peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=1)).layers_to_transform == (
        1,
    )


@pytest.mark.parametrize("init", ["gaussian", "pissa", "pissa_niter_16", "olora"])
def test_initializations_have_the_names_of_peft(init):
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=init)

    assert lora_config_from(config).init_lora_weights == init
    assert lora_config_from(peft.LoraConfig(target_modules="all-linear")).init_lora_weights == "default"


def test_each_field_of_peft_is_converted_ignored_or_rejected():
    sets = (from_peft.TAKEN, from_peft.COMPARED, from_peft.WITHOUT_EFFECT, from_peft.REFUSED)

    assert sum(map(len, sets)) == len(set().union(*sets)), "no field is in two sets"
    unknown = {field.name for field in fields(peft.LoraConfig)} - set().union(*sets)
    assert unknown == set()


UNSUPPORTED = {
    "init_lora_weights": "orthogonal",
    "bias": "all",
    "layers_pattern": "layers",
    "exclude_modules": ["q_proj"],
    "trainable_token_indices": {"lm_head": [1]},
    "lora_bias": True,
    "target_parameters": ["experts.weight"],
    "layer_replication": [(0, 1)],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "ensure_weight_tying": True,
    "megatron_config": {"a": 1},
    "auto_mapping": {"parent_library": "x"},
}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_fields_are_rejected_by_name(name):
    config = peft.LoraConfig(target_modules="all-linear")
    setattr(config, name, UNSUPPORTED[name])

    with pytest.raises(ConfigError, match=name) as refusal:
        lora_config_from(config)
    assert refusal.value.remedy


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": None}, "target_modules"),  # PEFT would look them up
        ({"task_type": "TOKEN_CLS"}, "task_type"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva'"),
        ({"r": 2048}, r"lora\.rank"),
    ],
)
def test_unusable_value_is_rejected_by_name(fields, named):
    with pytest.raises(ConfigError, match=named):
        lora_config_from(peft.LoraConfig(**{"target_modules": "all-linear", **fields}))


@pytest.mark.parametrize(("task_type", "task"), [("SEQ_CLS", "causal-lm"), ("CAUSAL_LM", "sequence-classification")])
def test_task_must_be_that_of_the_base_model(task_type: str, task: Task):
    config = peft.LoraConfig(target_modules="all-linear", task_type=task_type)

    with pytest.raises(ConfigError, match=f"task_type='{task_type}'") as refusal:
        lora_config_from(config, task=task)
    other: Task = "sequence-classification" if task == "causal-lm" else "causal-lm"
    assert f"task={other!r}" in refusal.value.remedy
    assert lora_config_from(config, task=other) == lora_config_from(peft.LoraConfig(target_modules="all-linear"))

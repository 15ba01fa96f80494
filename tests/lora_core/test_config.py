"""Configurations reject values out of range. The error names the field and its allowed values."""

from dataclasses import replace

import pytest

from lora_core.config import EarlyStoppingConfig, LoraConfig, ObjectiveConfig, OptimizerConfig, ScheduleConfig
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError, OutOfMemory
from tests.lora_core.scenarios import config

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "field", "bad"),
    [
        (LoraConfig(rank=8, alpha=16), "rank", [0, -1, 1025]),
        (LoraConfig(rank=8, alpha=16), "alpha", [0, -1, NAN, INF]),
        (LoraConfig(rank=8, alpha=16), "dropout", [-0.1, 0.91, 0.999999, 1.0, NAN]),
        (LoraConfig(rank=8, alpha=16), "target_modules", ["", (), ("q_proj", " "), "re:", "re:(", "re:(?<=a+)b"]),
        (LoraConfig(rank=8, alpha=16), "layers_to_transform", [(), (-1,)]),
        (LoraConfig(rank=8, alpha=16, target_modules="re:.*q_proj"), "layers_to_transform", [(0,)]),
        (LoraConfig(rank=8, alpha=16), "rank_pattern", [(("q_proj", 0),), (("q_proj", 1025),), (("(", 4),)]),
        (LoraConfig(rank=8, alpha=16), "alpha_pattern", [(("q_proj", 0.0),), (("q_proj", INF),), (("(", 4.0),)]),
        (OptimizerConfig(learning_rate=1e-3), "learning_rate", [0, -1, NAN, INF]),
        (OptimizerConfig(learning_rate=1e-3), "lora_plus_ratio", [0, -1, NAN, INF]),
        (OptimizerConfig(learning_rate=1e-3), "beta1", [-0.1, 1.0]),
        (OptimizerConfig(learning_rate=1e-3), "beta2", [-0.1, 1.0]),
        (OptimizerConfig(learning_rate=1e-3), "eps", [0, NAN, 1e-46, 1e39]),
        (OptimizerConfig(learning_rate=1e-3), "weight_decay", [-1, NAN]),
        (OptimizerConfig(learning_rate=1e-3), "max_grad_norm", [0, -1, NAN]),
        (OptimizerConfig(learning_rate=1e-3), "kind", ["adam"]),
        (OptimizerConfig(learning_rate=1e-3), "momentum", [0.9]),
        (OptimizerConfig(kind="sgd", learning_rate=1e-3), "momentum", [-0.1, 1.0, NAN]),
        (OptimizerConfig(learning_rate=1e-3), "beta2_decay", [-0.5]),
        (OptimizerConfig(kind="sgd", learning_rate=1e-3), "scale_floor", [0.1]),
        (OptimizerConfig(kind="adafactor", learning_rate=1e-3), "beta2_decay", [0.1, NAN, -INF]),
        (OptimizerConfig(kind="adafactor", learning_rate=1e-3), "clip_threshold", [0.9, NAN, INF]),
        (OptimizerConfig(kind="adafactor", learning_rate=1e-3), "scale_floor", [0, -1, NAN, INF]),
        (ScheduleConfig(kind="linear", num_steps=10), "kind", ["step"]),
        (ScheduleConfig(kind="linear", num_steps=10), "decay_steps", [1]),
        (ScheduleConfig(kind="wsd", num_steps=10, warmup_steps=4), "decay_steps", [-1, 7]),
        (ScheduleConfig(kind="linear", num_steps=10), "num_steps", [0]),
        (ScheduleConfig(kind="linear", num_steps=10), "warmup_steps", [-1, 11]),
        (config(), "batch_size", [0]),
        (config(), "num_steps", [0]),
        (config(), "seed", [-1, 2**63]),
        (config(), "evaluate_every_steps", [0]),
        (config(), "slice_tokens", [0]),
        (config(), "keep", ["first"]),
        (config(), "neftune_alpha", [-1, NAN, INF]),
        (config(objective=ObjectiveConfig(kind="dpo")), "neftune_alpha", [5.0]),
        (EarlyStoppingConfig(patience=3), "patience", [0]),
        (EarlyStoppingConfig(patience=3), "min_delta", [-0.1, NAN, INF]),
        (EngineConfig(), "token_budget", [0]),
        (EngineConfig(), "max_tick_seconds", [0, NAN]),
        (EngineConfig(), "num_lanes", [0]),
    ],
)
def test_out_of_range_values_are_rejected_with_the_field_name(make, field, bad):
    for value in bad:
        with pytest.raises(ConfigError, match=field) as caught:
            replace(make, **{field: value})
        assert field in caught.value.remedy


def test_schedule_shorter_than_the_job_is_rejected():
    schedule = ScheduleConfig(kind="linear", num_steps=5)
    with pytest.raises(ConfigError, match=r"schedule\.num_steps is 5") as caught:
        replace(config(num_steps=5), schedule=schedule, num_steps=10)
    assert "num_steps (10)" in caught.value.message
    assert replace(config(num_steps=5), schedule=schedule, num_steps=4).schedule == schedule


@pytest.mark.parametrize("fields", [{"keep": "best"}, {"early_stopping": EarlyStoppingConfig(patience=1)}])
def test_options_that_need_an_evaluation_are_rejected_without_one(fields):
    for every in (None, 5):
        with pytest.raises(ConfigError, match=f"evaluate_every_steps is {every}") as caught:
            replace(config(num_steps=4, evaluate_every_steps=every), **fields)
        assert "between 1 and num_steps (4)" in caught.value.message
        assert replace(config(num_steps=4, evaluate_every_steps=every)).keep == "last"
    for every in (1, 4):
        assert replace(config(num_steps=4, evaluate_every_steps=every), **fields).needs_evaluation


def test_error_text_contains_its_remedy_once():
    for error in (ConfigError("It is wrong.", remedy="Fix it."), OutOfMemory("j")):
        assert str(error) == f"{error.message} {error.remedy}"
        assert error.remedy not in error.message


def test_digest_changes_with_the_fields():
    assert config().digest() == config().digest()
    assert config(seed=1).digest() != config(seed=2).digest()
    whole = replace(config(), optimizer=OptimizerConfig(learning_rate=1))
    assert whole.digest() == replace(config(), optimizer=OptimizerConfig(learning_rate=1.0)).digest()
    assert config(dropout=0.1).digest() != config(dropout=0.2).digest()
    patterns = [replace(config().lora, alpha_pattern=(("q_proj", alpha),)) for alpha in (4, 4.0, 5.0)]
    digests = [replace(config(), lora=lora).digest() for lora in patterns]
    assert digests[0] == digests[1] != digests[2]


def test_rank_stabilized_scaling_divides_by_the_root_of_the_rank():
    assert LoraConfig(rank=16, alpha=32).scale_of("layers.0.q_proj") == 2
    assert LoraConfig(rank=16, alpha=32, use_rslora=True).scale_of("layers.0.q_proj") == 8


def test_first_matching_pattern_sets_rank_and_alpha_of_a_module():
    config = LoraConfig(
        rank=8,
        alpha=16,
        rank_pattern=(("layers.1.q_proj", 2), (r"layers\.\d.[qk]_proj", 4)),
        alpha_pattern=(("q_proj", 1.0),),
    )
    assert [config.rank_of(f"model.layers.{name}") for name in ("1.q_proj", "0.q_proj", "0.v_proj")] == [2, 4, 8]
    assert [config.scale_of(f"model.layers.{name}") for name in ("1.q_proj", "1.k_proj")] == [0.5, 4]

# pyright: basic
"""Converts a `peft.LoraConfig` to the engine's LoraConfig. Unsupported fields are rejected by name.

Every field of PEFT's class is in one of the sets below. A test compares them with the installed class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_core.config import ALL_LINEAR, INIT, LoraConfig
from lora_core.errors import ConfigError
from lora_core.layers.task_heads import Task
from lora_core.module_paths import REGEX_PREFIX

if TYPE_CHECKING:
    import peft

TAKEN = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "init_lora_weights"),
    *("modules_to_save", "trainable_token_indices"),
}
"""Fields that are converted to LoraConfig."""
COMPARED = {"task_type"}
"""Fields that must match the base model's task."""
WITHOUT_EFFECT = {
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    "fan_in_fan_out",  # PEFT derives it from the layer too, with a warning
    "runtime_config",  # only affects how PEFT loads an adapter
}
"""Fields that describe the adapter's file or how PEFT runs. Training ignores them."""
REFUSED = {
    *("auto_mapping", "exclude_modules", "bias", "layers_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config"),
    *("alora_invocation_tokens", "use_qalora", "qalora_group_size", "monteclora_config", "layer_replication"),
    *("lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying"),
}
"""Fields that the engine does not support. They must have PEFT's default value."""
TASK_TYPES: dict[Task, str] = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
"""PEFT's names of the tasks for which a base model can be loaded."""
INPUT_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}
"""Names of the input embedding table in various model families."""


def lora_config_from(config: peft.LoraConfig, *, task: Task = "causal-lm") -> LoraConfig:
    """Convert a config for a base model that is loaded for `task`. Raises ConfigError with the unsupported field."""
    import peft  # imported late: a trainer only needs the names above, and the caller has imported it anyway

    _require_task(config.task_type, task)
    start = _start(config.init_lora_weights)  # checked first: PEFT fills in other fields for some initializations
    default = peft.LoraConfig()
    for name in sorted(REFUSED & set(vars(config))):
        if getattr(config, name) != getattr(default, name):
            raise _unsupported(name, getattr(config, name), f"Leave it at the default, {getattr(default, name)!r}.")
    return LoraConfig(
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=_target_modules(config.target_modules),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=tuple((config.rank_pattern or {}).items()),
        alpha_pattern=tuple((config.alpha_pattern or {}).items()),
        layers_to_transform=_layers(config.layers_to_transform),
        modules_to_save=tuple(sorted(config.modules_to_save or ())),
        trainable_token_indices=_tokens(config.trainable_token_indices),
        init_lora_weights=start,
    )


def _require_task(task_type: str | None, task: Task) -> None:
    if task_type in (None, TASK_TYPES[task]):
        return
    other = next((name for name, theirs in TASK_TYPES.items() if theirs == task_type), None)
    if other is None:
        raise _unsupported("task_type", task_type, f"Use one of {', '.join(TASK_TYPES.values())}.")
    raise ConfigError(
        f"task_type={task_type!r} of peft.LoraConfig is for a base model for {other}, but this one is for {task}.",
        remedy=f"Use {TASK_TYPES[task]!r}, or pass task={other!r} both here and to load_base.",
    )


def _target_modules(wanted: list[str] | set[str] | str | None) -> str | tuple[str, ...]:
    """Convert target modules. PEFT reads one string as a regular expression, and None as defaults by model type."""
    if wanted is None:
        raise _unsupported("target_modules", wanted, f"Use {ALL_LINEAR!r} or a list of module names.")
    if isinstance(wanted, str):
        return wanted if wanted == ALL_LINEAR else f"{REGEX_PREFIX}{wanted}"
    return tuple(sorted(wanted))


def _layers(wanted: list[int] | int | None) -> tuple[int, ...] | None:
    if wanted is None:
        return None
    return (wanted,) if isinstance(wanted, int) else tuple(wanted)


def _tokens(wanted: list[int] | dict[str, list[int]] | None) -> tuple[int, ...]:
    """Convert token ids. PEFT accepts a list for the input embeddings, or a dict of lists by module name."""
    if isinstance(wanted, dict):
        if wanted.keys() - INPUT_EMBEDDINGS or len(wanted) != 1:
            raise _unsupported("trainable_token_indices", wanted, "Use a list of tokens of the input embeddings.")
        (wanted,) = wanted.values()
    return tuple(wanted or ())


def _start(wanted: bool | str) -> str:
    if wanted is True:
        return "default"
    if not isinstance(wanted, str) or INIT.fullmatch(wanted) is None:
        remedy = "Use True, 'gaussian', 'pissa', 'pissa_niter_N' with N from 1 to 99, or 'olora'."
        raise _unsupported("init_lora_weights", wanted, remedy)
    return wanted


def _unsupported(name: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"The engine does not support {name}={value!r} of peft.LoraConfig.", remedy=remedy)

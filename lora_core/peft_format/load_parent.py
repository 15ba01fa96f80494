# pyright: basic
"""Loads the parent adapter of a job, a folder in PEFT's layout that Lorry or any other program wrote.

The folder is untrusted. Names and shapes are compared with the job before values are read. A job can only continue an
adapter that computes the same function as its own initial adapter would.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.adapter.modules_to_save import TOKENS_SUFFIX
from lora_core.base_model.model import BaseModel
from lora_core.base_model.quantization import Quantization, quantization_in_training
from lora_core.config import LoraConfig
from lora_core.errors import BadParent, ConfigError, LoraCoreError, UnsafeFile
from lora_core.module_paths import PatternTooSlow, compiles, pattern_value
from lora_core.peft_format.config import REFUSED, TAKEN, WITHOUT_EFFECT
from lora_core.peft_format.export import CONFIG, PREFIX, WEIGHTS, exceptions
from lora_core.runtime.safetensors_io import file_sha256, read_header

MAX_CONFIG_BYTES = 8 * 2**20
LARGEST = 1e30
"""Maximum absolute value of numbers in the configuration. JSON integers can exceed the range of a float."""
DTYPES = ("F32", "BF16", "F16")
"""Dtypes that fp32 represents exactly."""
SUFFIX_A, SUFFIX_B, SUFFIX_MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model's weights unchanged."""
CHOOSE_TARGETS = {"exclude_modules", "layers_pattern"}
"""Fields that only select the adapted layers, which the tensor names show as well."""
DEFAULT_REMEDY = "Use an unmodified folder written by PEFT's save_pretrained or by Lorry."

OTHER_BASE_REMEDY = "Use the base model that it was trained on, with the same task."


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """An adapter's folder: the LoraConfig with which a job can continue it, and the base model's quantization.

    `shapes` are those of the tensors, by PEFT's name without the prefix. `paths` are the adapted layers.
    """

    lora: LoraConfig
    quantization: Quantization
    paths: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]


def lora_config_of(directory: Path | str) -> LoraConfig:
    """Return the LoraConfig with which a job can continue the adapter in `directory`. Raises BadParent."""
    return _read(Path(directory)).lora


def refuse_other_start(lora: LoraConfig) -> None:
    """Raise ConfigError if the job has both a parent and an initialization of its own."""
    if lora.init_lora_weights != "default":
        raise ConfigError(
            f"lora.init_lora_weights is {lora.init_lora_weights!r}, but the job starts with its parent's weights.",
            remedy="Remove either lora.init_lora_weights or the parent adapter.",
        )


def begin_from(adapter: FlatAdapter, directory: Path, base: BaseModel) -> str:
    """Copy the weights of the adapter in `directory` to a new adapter. Return the sha256 of the weights file.

    Tensors that the job trains in full but the parent didn't keep their values. Raises BadParent if the folder can't be
    used, and ConfigError if the job's configuration differs from the parent's.
    """
    parent = _read(directory)
    _require_same_base(parent, base)
    _require_same_function(adapter, parent)
    masters = adapter.masters()
    _require_shapes(parent, {name: tuple(master.shape) for name, master in masters.items()}, adapter)
    digest = file_sha256(directory / WEIGHTS)
    for name, tensor in load_file(directory / WEIGHTS).items():
        masters[name.removeprefix(PREFIX)].copy_(tensor)
    adapter.refresh_compute()
    if not (torch.isfinite(adapter.p).all() and torch.isfinite(adapter.compute).all()):
        raise _bad(
            "some of its weights are infinite or NaN in the training dtype", remedy="Use another parent adapter."
        )
    return digest


def _read(directory: Path) -> Parent:
    """Read and validate a folder. Raises BadParent."""
    content = _read_config(directory)
    try:
        header = read_header(directory / WEIGHTS)
        quantization = quantization_in_training(directory / WEIGHTS)
    except UnsafeFile as error:
        raise _bad(error.message.removesuffix(".")) from error
    for name, (dtype, _) in header.items():
        if not name.startswith(PREFIX):
            raise _bad(f"its tensor {name[:200]!r} does not follow PEFT's naming")
        if dtype not in DTYPES:
            raise _bad(f"its tensor {name[:200]} has the dtype {dtype}: expected {', '.join(DTYPES)}")
    shapes = {name.removeprefix(PREFIX): shape for name, (_, shape) in header.items()}
    paths = tuple(name.removesuffix(SUFFIX_A) for name in shapes if name.endswith(SUFFIX_A))
    if not paths:
        raise _bad("it does not adapt any linear layer")
    try:
        lora = _lora_config(content, paths, shapes)
    except PatternTooSlow as error:
        raise _bad("a pattern in its adapter_config.json takes too long to match a module path") from error
    except LoraCoreError as error:
        if isinstance(error, BadParent):
            raise
        raise _bad(f"in its adapter_config.json, {error.message.removesuffix('.')}") from error
    return Parent(lora=lora, quantization=quantization, paths=paths, shapes=shapes)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / "adapter_model.bin").exists()
        reason = "its weights are a pickle, which can run code" if pickled else f"{WEIGHTS} is missing"
        raise _bad(reason, remedy="Save it with PEFT's save_pretrained(folder, safe_serialization=True).")
    path = directory / CONFIG
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        raise _bad(f"{CONFIG} is missing or exceeds {MAX_CONFIG_BYTES} bytes")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise _bad(f"{CONFIG} is not valid JSON") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise _bad(f"{CONFIG} does not describe a plain LoRA adapter")
    if content.get("auto_mapping"):
        raise _bad(
            f"the auto_mapping of {CONFIG} names classes to import",
            remedy='Save it with a task_type, or set "auto_mapping" to null and "task_type" to "CAUSAL_LM" there.',
        )
    _refuse_unsupported(content)
    return content


def _refuse_unsupported(content: dict[str, Any]) -> None:
    """Reject unsupported fields unless they have PEFT's default, and unknown fields unless they are empty."""
    import peft  # imported late: it takes a second, and only jobs with a parent need it

    start = content.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise _bad(
            f"it was initialized with init_lora_weights={start!r}, so it belongs to a changed copy of the base model",
            remedy="Save it as plain LoRA with save_pretrained's path_initial_model_for_weight_conversion.",
        )
    defaults = vars(peft.LoraConfig())
    known = TAKEN | WITHOUT_EFFECT | CHOOSE_TARGETS | {"task_type"}
    for name in sorted(content.keys() - known):
        value = content[name]
        if value and (name not in REFUSED or value != defaults.get(name)):
            raise _bad(f"its adapter_config.json has {name[:80]}={value!r:.80}, which is not supported")


def _lora_config(content: dict[str, Any], paths: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> LoraConfig:
    """Return the LoraConfig with full layer paths, however PEFT selected them (by names, pattern or exclusions)."""
    rank, alpha = _number(content, "r", 8, whole=True), _number(content, "lora_alpha", 8)
    alphas = {path: _of_pattern(content, "alpha_pattern", path, alpha) for path in paths}
    ranks = {path: _of_pattern(content, "rank_pattern", path, rank, whole=True) for path in paths}
    for path, expected in ranks.items():
        if shapes[f"{path}{SUFFIX_A}"][:1] != (expected,):
            raise _bad(f"its adapter_config.json gives {path} the rank {expected}, but its weights have another rank")
    dora = {name.removesuffix(SUFFIX_MAGNITUDE) for name in shapes if name.endswith(SUFFIX_MAGNITUDE)}
    if bool(content.get("use_dora")) != bool(dora):
        raise _bad("use_dora in its adapter_config.json does not match the tensors in its weights file")
    return LoraConfig(
        rank=int(rank),
        alpha=alpha,
        dropout=_number(content, "lora_dropout", 0.0),
        target_modules=paths,
        rank_pattern=tuple((key, int(value)) for key, value in exceptions(ranks, rank).items()),
        alpha_pattern=tuple(exceptions(alphas, alpha).items()),
        use_rslora=bool(content.get("use_rslora")),
        use_dora=bool(dora),
        modules_to_save=() if content.get("task_type") == "SEQ_CLS" else _modules(shapes),
        trainable_token_indices=_tokens(content),
    )


def _number(content: dict[str, Any], name: str, default: float, *, whole: bool = False) -> float:
    value = content.get(name, default)
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= LARGEST:
        raise _bad(f"its adapter_config.json has {name}={value!r:.80}, which is not a valid number")
    return value


def _of_pattern(content: dict[str, Any], name: str, path: str, default: float, *, whole: bool = False) -> float:
    patterns = content.get(name) or {}
    if not isinstance(patterns, dict) or not all(map(compiles, patterns)):
        raise _bad(f"its adapter_config.json has {name}={patterns!r:.80}, which are not valid patterns")
    key = pattern_value(path, [(key, key) for key in patterns], "")
    return _number(patterns, key, default, whole=whole) if key else default


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the paths of modules trained in full. Raises BadParent for unsupported parts of an adapter."""
    modules: set[str] = set()
    for name in shapes:
        if name.endswith((SUFFIX_A, SUFFIX_B, SUFFIX_MAGNITUDE, TOKENS_SUFFIX)):
            continue
        if ".lora_" in name or ".base_layer." in name or "token_adapter" in name:
            raise _bad(f"it contains the tensor {name[:200]}, which is not supported")
        modules.add(name.rpartition(".")[0])
    return tuple(sorted(modules))


def _tokens(content: dict[str, Any]) -> tuple[int, ...]:
    """Return token ids. PEFT accepts a list, or a dict of lists by table, of which one is supported."""
    wanted = content.get("trainable_token_indices") or []
    if isinstance(wanted, dict) and len(wanted) == 1:
        (wanted,) = wanted.values()
    if not isinstance(wanted, list) or not all(type(token) is int for token in wanted):
        raise _bad(f"its adapter_config.json has trainable_token_indices={wanted!r:.80}: only one list is supported")
    return tuple(wanted)


def _require_same_base(parent: Parent, base: BaseModel) -> None:
    """Compare layer names and the base model's quantization.

    Files that Lorry did not write contain no quantization and are assumed to have none.
    """
    unknown = sorted(set(parent.paths) - set(base.linear_names()))
    if unknown:
        raise _bad(f"it adapts {unknown[0][:200]}, which this base model doesn't have", remedy=OTHER_BASE_REMEDY)
    if parent.quantization != base.quantization:
        raise _bad(
            f"its base model had the quantization {parent.quantization} in training, but this one has "
            f"{base.quantization}",
            remedy=f"Use the base model with the quantization {parent.quantization!r}.",
        )


def _require_same_function(adapter: FlatAdapter, parent: Parent) -> None:
    """Raise ConfigError with the field that differs."""
    lora, theirs = adapter.lora, parent.lora
    if lora.use_dora != theirs.use_dora:
        raise _differs("use_dora", lora.use_dora, theirs.use_dora)
    for path in sorted(adapter.sites.keys() ^ set(parent.paths)):
        has, hasnt = ("the job", "its parent") if path in adapter.sites else ("the parent", "the job")
        raise _other("target_modules", f"{has} adapts {path}, but {hasnt} doesn't")
    for path in parent.paths:
        if lora.rank_of(path) != theirs.rank_of(path):
            raise _differs("rank", lora.rank_of(path), theirs.rank_of(path), path=path)
        if lora.scale_of(path) != theirs.scale_of(path):
            field = "alpha" if lora.use_rslora == theirs.use_rslora else "use_rslora"
            raise _differs(field, lora.scale_of(path), theirs.scale_of(path), path=path, what="scale")
    tokens = theirs.trainable_token_indices
    if tokens and lora.trainable_token_indices != tokens:
        raise _other("trainable_token_indices", f"the parent trained {list(tokens)!r:.80}, in this order")


def _require_shapes(parent: Parent, wanted: dict[str, tuple[int, ...]], adapter: FlatAdapter) -> None:
    """Require that the job has every tensor of the folder, and the folder every tensor of the adapted layers."""
    for name, shape in parent.shapes.items():
        if name not in wanted:
            raise _other("modules_to_save", f"the parent has {name[:200]}, but the job does not train it")
        if shape != wanted[name]:
            reason = f"its {name} has the shape {list(shape)}, but this base model or job needs {list(wanted[name])}"
            raise _bad(reason, remedy=OTHER_BASE_REMEDY)
    in_full = {tensor.name for tensor in adapter.trained.tensors}
    for name in sorted(wanted.keys() - parent.shapes.keys() - in_full):
        raise _bad(f"its {name} is missing")


def _differs(field: str, own: object, other: object, *, path: str = "", what: str = "") -> ConfigError:
    place = f" of {path}" if path else ""
    return _other(field, f"the {what or field}{place} is {own} in the job and {other} in its parent")


def _other(field: str, reason: str) -> ConfigError:
    return ConfigError(
        f"lora.{field} differs from the parent adapter: {reason}.",
        remedy="Omit the job's lora settings to inherit the parent's (in the library: "
        "lora_core.peft_format.load_parent.lora_config_of), or train without a parent.",
    )


def _bad(reason: str, *, remedy: str = DEFAULT_REMEDY) -> BadParent:
    return BadParent(f"The parent adapter can't be used: {reason}.", remedy=remedy)

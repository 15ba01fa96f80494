# pyright: basic
"""A job that continues an adapter begins with its numbers: the parent is a folder in PEFT's layout, ours or anybody's.

The folder is a stranger's. What it says is compared with what the job has, name by name and shape by shape, before
a number is read; a job continues only what computes the same function as the adapter that it would begin with.
"""

import hashlib
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
from lora_core.peft_format.export import PREFIX, exceptions
from lora_core.runtime.safetensors_io import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 8 * 2**20
LARGEST = 1e30
"""Of a number in the configuration: JSON's may be longer than a float."""
DTYPES = ("F32", "BF16", "F16")
"""What fp32 holds exactly."""
SUFFIX_A, SUFFIX_B, SUFFIX_MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Of `init_lora_weights`: those that leave the base model's own weights as they are."""
CHOOSE_TARGETS = {"exclude_modules", "layers_pattern"}
"""Fields that only say which layers are adapted, which the tensors say as well."""
DEFAULT_REMEDY = "Give the folder that PEFT's save_pretrained or Lorry wrote, with its files as they were."

OTHER_BASE_REMEDY = "Continue it on the base model that it was trained on, for the same task."


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """What a folder holds: `lora` as a job would have to ask for it, the shape of each tensor by PEFT's name without
    the prefix, and how its base was held in training."""

    lora: LoraConfig
    quantization: Quantization
    paths: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]


def lora_config_of(directory: Path | str) -> LoraConfig:
    """The LoraConfig of a job that continues the adapter in `directory`. Raises BadParent."""
    return _read(Path(directory)).lora


def refuse_other_start(lora: LoraConfig) -> None:
    """Raises ConfigError."""
    if lora.init_lora_weights != "default":
        raise ConfigError(
            f"lora.init_lora_weights is {lora.init_lora_weights!r}, but the job begins with its parent's weights.",
            remedy="Leave out either lora.init_lora_weights or the parent.",
        )


def begin_from(adapter: FlatAdapter, directory: Path, base: BaseModel) -> str:
    """Fill a new row with the weights of the adapter in `directory`; returns the sha256 of its weights' file.

    What the job trains in full and the parent didn't stays as it is. Raises BadParent for a folder that can't be
    used, ConfigError for a job that asks for something else than the folder has.
    """
    parent = _read(directory)
    _require_same_base(parent, base)
    _require_same_function(adapter, parent)
    masters = adapter.masters()
    _require_shapes(parent, {name: tuple(master.shape) for name, master in masters.items()}, adapter)
    with (directory / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for name, tensor in load_file(directory / WEIGHTS).items():
        masters[name.removeprefix(PREFIX)].copy_(tensor)
    adapter.refresh_compute()
    if not (torch.isfinite(adapter.p).all() and torch.isfinite(adapter.compute).all()):
        raise _bad("it holds numbers that are not finite in the dtype of training", remedy="Give another adapter.")
    return digest


def _read(directory: Path) -> Parent:
    """Raises BadParent."""
    content = _read_config(directory)
    try:
        header = read_header(directory / WEIGHTS)
        quantization = quantization_in_training(directory / WEIGHTS)
    except UnsafeFile as error:
        raise _bad(error.message.removesuffix(".")) from error
    for name, (dtype, _) in header.items():
        if not name.startswith(PREFIX):
            raise _bad(f"its tensor {name[:200]!r} isn't named as PEFT names them")
        if dtype not in DTYPES:
            raise _bad(f"its tensor {name[:200]} is of {dtype}, not of {', '.join(DTYPES)}")
    shapes = {name.removeprefix(PREFIX): shape for name, (_, shape) in header.items()}
    paths = tuple(name.removesuffix(SUFFIX_A) for name in shapes if name.endswith(SUFFIX_A))
    if not paths:
        raise _bad("it adapts no linear layer")
    try:
        lora = _lora_config(content, paths, shapes)
    except PatternTooSlow as error:
        raise _bad("a pattern of its adapter_config.json takes too long to match a module's path") from error
    except LoraCoreError as error:
        if isinstance(error, BadParent):
            raise
        raise _bad(f"of what its adapter_config.json says, {error.message.removesuffix('.')}") from error
    return Parent(lora=lora, quantization=quantization, paths=paths, shapes=shapes)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / "adapter_model.bin").exists()
        reason = "its weights are a pickle, which may run code" if pickled else f"{WEIGHTS} is missing"
        raise _bad(reason, remedy="Save it with PEFT's save_pretrained(folder, safe_serialization=True).")
    path = directory / CONFIG
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        raise _bad(f"{CONFIG} is missing or above {MAX_CONFIG_BYTES} bytes")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise _bad(f"{CONFIG} is not valid JSON") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise _bad(f"{CONFIG} is not that of a plain LoRA adapter")
    if content.get("auto_mapping"):
        raise _bad(
            f"the auto_mapping of {CONFIG} names classes to import",
            remedy='Save it with a task_type, or set "auto_mapping" to null and "task_type" to "CAUSAL_LM" there.',
        )
    _refuse_unsupported(content)
    return content


def _refuse_unsupported(content: dict[str, Any]) -> None:
    """A field that this engine's adapters haven't, unless it is at PEFT's default; one that nobody here knows, unless
    it is empty."""
    import peft  # not at the top: its import takes a second, and only those who continue an adapter need it

    start = content.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise _bad(
            f"it began with init_lora_weights={start!r}, so it belongs to a changed copy of the base model",
            remedy="Save it as plain LoRA, by save_pretrained's path_initial_model_for_weight_conversion.",
        )
    defaults = vars(peft.LoraConfig())
    known = TAKEN | WITHOUT_EFFECT | CHOOSE_TARGETS | {"task_type"}
    for name in sorted(content.keys() - known):
        value = content[name]
        if value and (name not in REFUSED or value != defaults.get(name)):
            raise _bad(f"its adapter_config.json has {name[:80]}={value!r:.80}, which the engine doesn't support")


def _lora_config(content: dict[str, Any], paths: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> LoraConfig:
    """Layers by their whole paths: how PEFT came to choose them (names, a pattern, exclusions) is no matter then."""
    rank, alpha = _number(content, "r", 8, whole=True), _number(content, "lora_alpha", 8)
    alphas = {path: _of_pattern(content, "alpha_pattern", path, alpha) for path in paths}
    ranks = {path: _of_pattern(content, "rank_pattern", path, rank, whole=True) for path in paths}
    for path, expected in ranks.items():
        if shapes[f"{path}{SUFFIX_A}"][:1] != (expected,):
            raise _bad(f"its files contradict each other: adapter_config.json gives {path} the rank {expected}")
    dora = {name.removesuffix(SUFFIX_MAGNITUDE) for name in shapes if name.endswith(SUFFIX_MAGNITUDE)}
    if bool(content.get("use_dora")) != bool(dora):
        raise _bad("its files contradict each other about use_dora")
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
        raise _bad(f"its adapter_config.json has {name}={value!r:.80}, which is no number for it")
    return value


def _of_pattern(content: dict[str, Any], name: str, path: str, default: float, *, whole: bool = False) -> float:
    patterns = content.get(name) or {}
    if not isinstance(patterns, dict) or not all(map(compiles, patterns)):
        raise _bad(f"its adapter_config.json has {name}={patterns!r:.80}, which are no patterns")
    key = pattern_value(path, [(key, key) for key in patterns], "")
    return _number(patterns, key, default, whole=whole) if key else default


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Paths of modules that were trained in full. Raises BadParent for parts of an adapter that there are none here."""
    modules: set[str] = set()
    for name in shapes:
        if name.endswith((SUFFIX_A, SUFFIX_B, SUFFIX_MAGNITUDE, TOKENS_SUFFIX)):
            continue
        if ".lora_" in name or ".base_layer." in name or "token_adapter" in name:
            raise _bad(f"it has {name[:200]}, a part of an adapter that the engine doesn't support")
        modules.add(name.rpartition(".")[0])
    return tuple(sorted(modules))


def _tokens(content: dict[str, Any]) -> tuple[int, ...]:
    """PEFT takes a list, or lists by the names of tables, of which one is supported here."""
    wanted = content.get("trainable_token_indices") or []
    if isinstance(wanted, dict) and len(wanted) == 1:
        (wanted,) = wanted.values()
    if not isinstance(wanted, list) or not all(type(token) is int for token in wanted):
        raise _bad(f"its adapter_config.json has trainable_token_indices={wanted!r:.80}, and one list is supported")
    return tuple(wanted)


def _require_same_base(parent: Parent, base: BaseModel) -> None:
    """As far as names tell, and how the base was held in training: a file that wasn't written here says nothing of
    that, and is taken to be of a plain one."""
    unknown = sorted(set(parent.paths) - set(base.linear_names()))
    if unknown:
        raise _bad(f"it adapts {unknown[0][:200]}, which this base model doesn't have", remedy=OTHER_BASE_REMEDY)
    if parent.quantization != base.quantization:
        raise _bad(
            f"it was trained on its base held as {parent.quantization}, and this base is held as {base.quantization}",
            remedy=f"Continue it on the base model with the quantization {parent.quantization!r}.",
        )


def _require_same_function(adapter: FlatAdapter, parent: Parent) -> None:
    """Raises ConfigError, which names the field."""
    lora, theirs = adapter.lora, parent.lora
    if lora.use_dora != theirs.use_dora:
        raise _differs("use_dora", lora.use_dora, theirs.use_dora)
    for path in sorted(adapter.sites.keys() ^ set(parent.paths)):
        has, hasnt = ("the job", "its parent") if path in adapter.sites else ("the parent", "the job")
        raise _other("target_modules", f"{has} adapts {path}, which {hasnt} doesn't")
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
    """Every tensor of the folder has a place in the job, and every adapted layer of the job a tensor in the folder."""
    for name, shape in parent.shapes.items():
        if name not in wanted:
            raise _other("modules_to_save", f"the parent has {name[:200]}, which the job has no place for")
        if shape != wanted[name]:
            reason = f"its {name} has the shape {list(shape)}, and this base model or job needs {list(wanted[name])}"
            raise _bad(reason, remedy=OTHER_BASE_REMEDY)
    in_full = {tensor.name for tensor in adapter.trained.tensors}
    for name in sorted(wanted.keys() - parent.shapes.keys() - in_full):
        raise _bad(f"its {name} is missing")


def _differs(field: str, ours: object, theirs: object, *, path: str = "", what: str = "") -> ConfigError:
    place = f" of {path}" if path else ""
    return _other(field, f"the {what or field}{place} is {ours} in the job and {theirs} in its parent")


def _other(field: str, reason: str) -> ConfigError:
    return ConfigError(
        f"lora.{field} doesn't continue the parent adapter: {reason}.",
        remedy="Leave the job's lora settings out, so that they are the parent's (in the library: "
        "lora_core.peft_format.load_parent.lora_config_of), or train without a parent.",
    )


def _bad(reason: str, *, remedy: str = DEFAULT_REMEDY) -> BadParent:
    return BadParent(f"The parent adapter is refused: {reason}.", remedy=remedy)

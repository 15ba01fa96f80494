# pyright: basic
"""Loads a folder of config.json and weights with transformers, and rejects models that can't be trained here.

No pickle, no trust_remote_code, no auto_map: a model that needs code of its own is rejected.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lora_core.errors import UnsupportedModel
from lora_core.layers.task_heads import NUM_PLACEHOLDER_CLASSES, Task, task_head_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
IMPLEMENTATION = re.compile(r"(attn|experts)_implementation", re.IGNORECASE)
BUILT_IN = (None, True, False, "eager", "sdpa")
"""Values of an implementation key that load no code. Others may name a kernel on the Hub, which is native code."""
KERNELS = ("use_kernels", "kernel_config")
REFERENCE = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w.-]+)?")
"""OWNER/NAME of a Hub repository, optionally with a revision and a part."""
NAMES_OF_ORIGIN = re.compile(r"name_or_path$|^(base_)?model(_name)?$")
"""Keys that record the origin of a model. Nothing is loaded through them."""
LABELS = ("id2label", "label2id")
"""Objects with a classifier's labels, such as "N/A", which are plain text."""
OTHER_MODEL = "Use a causal language model that transformers supports, as safetensors or GGUF."
COMPLETE = "Download all files of the model again, and use the new folder."
TO_SAFETENSORS = "Convert the weights to safetensors, for example with save_pretrained of transformers."


AUTO_MODELS: dict[Task, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


def read_config(folder: Path, task: Task = "causal-lm") -> Any:
    """Load the config of a folder. Raises UnsupportedModel if it needs code or has no dense model for the task."""
    refuse_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise refused(f"the config.json in {folder.name!r} can't be read: {error}", remedy=COMPLETE) from error
    refuse_towers(config)
    if type(config) not in AUTO_MODELS[task]._model_mapping:
        kind = {"causal-lm": "causal language model", "sequence-classification": "classifier of sequences"}[task]
        raise refused(f"transformers has no {kind} for models of type {config.model_type!r}")
    if task == "sequence-classification":
        config.num_labels = NUM_PLACEHOLDER_CLASSES
    refuse_unpackable(config)
    return config


def weight_names(folder: Path) -> list[str]:
    """Return the files from which transformers would load the weights, [] if there are none. Raises UnsupportedModel.

    Other weight formats in the folder are ignored.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise refused(f"{INDEX} can't be read ({type(error).__name__})", remedy=COMPLETE) from error
    foreign = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]
    if foreign or not names:
        raise refused(
            f"{INDEX} lists {foreign[0]!r}, which is not a safetensors file in this folder"
            if foreign
            else f"{INDEX} does not list any files",
            remedy=COMPLETE,
        )
    return names


def refuse_code(folder: Path) -> None:
    """Raise UnsupportedModel if a JSON file of the folder names Python code to load."""
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith((".index.json", "tokenizer.json", "vocab.json")):
            continue
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise refused(f"{path.name} is not valid JSON", remedy=COMPLETE) from error
        for parent, key, value in _entries(content):
            may_refer = path.name == "config.json" and parent not in LABELS
            if (reason := _code_reason(key, value, may_refer=may_refer)) is not None:
                raise refused(f"{path.name} has {key!r}, {reason}")


def _entries(content: Any, parent: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (key of the parent object, key, value) of every entry at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield parent, key, value
            yield from _entries(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value)


def _code_reason(key: str, value: Any, *, may_refer: bool) -> str | None:
    """Return why transformers might load code for an entry, or None. `may_refer`: a value may name a repository."""
    if key == "auto_map":
        return "which requires custom code"
    if IMPLEMENTATION.search(key) and not (value is None or (isinstance(value, bool | str) and value in BUILT_IN)):
        return f"which names an implementation that may be loaded as code, {str(value)[:100]!r}; remove the entry"
    if key.lower() in KERNELS and value:
        return "which loads kernels as code; remove the entry"
    is_reference = isinstance(value, str) and REFERENCE.fullmatch(value) is not None
    if may_refer and is_reference and not NAMES_OF_ORIGIN.search(key):
        return f"which refers to a repository, {str(value)[:100]!r}; remove the entry"
    return None


def built_in_attention(config: Any, task: Task = "causal-lm") -> str:
    """Return transformers' default attention explicitly, so that no config can override it. Engines replace it."""
    classes: Any = AUTO_MODELS[task]._model_mapping
    found = classes[type(config)]
    model_class = found[0] if isinstance(found, tuple) else found
    return "sdpa" if model_class._supports_sdpa else "eager"


def refuse_quantized(config: Any) -> None:
    """Raise UnsupportedModel for weights in the quantized format of another library, whose code would read them."""
    if getattr(config, "quantization_config", None) is not None:
        raise refused("its weights are quantized", remedy="Use the original weights, and set quantization instead.")


def refuse_towers(config: Any) -> None:
    """Raise UnsupportedModel for multimodal models, of which transformers would build all parts."""
    towers = {"images": "vision_config", "sound": "audio_config"}
    read = [f"{what} ({name})" for what, name in towers.items() if getattr(config, name, None) is not None]
    if read:
        raise UnsupportedModel(
            f"Models of type {config.model_type!r} aren't supported: this one also reads {' and '.join(read)}.",
            remedy="Use a checkpoint that is only a language model: for Gemma 3 the 270M and 1B models (model_type "
            "'gemma3_text'), or a dense decoder such as a Llama, Qwen3, Mistral or GPT-2 model.",
        )


def refuse_unpackable(config: Any) -> None:
    """Raise UnsupportedModel for models that can't keep packed sequences apart.

    Experts mix tokens of jobs. Recurrent and convolutional layers carry state across sequences. "dynamic" rotary
    frequencies carry state across passes.
    """
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, name, None) for name in experts):
        raise unpackable(config, "routes tokens to experts")
    allowed = {"full_attention", "sliding_attention", "attention"}
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - allowed)
    if foreign:
        raise unpackable(config, f"has layers of the type {', '.join(map(repr, foreign))}")
    dynamic = [kind for kind in _rotary_kinds(config) if "dynamic" in kind]
    if dynamic:
        raise UnsupportedModel(
            f"Models of type {config.model_type!r} with rope_type {dynamic[0]!r} aren't supported: their rotary "
            "frequencies depend on the longest sequence of earlier passes.",
            remedy="Use a copy with rope_type 'default' in config.json, which for a Llama-like model gives the same "
            "results up to max_position_embeddings, or choose another model.",
        )


def _rotary_kinds(config: Any) -> list[str]:
    """Return the rotary kinds of the whole model and of each layer type."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return [str(part.get("rope_type")) for part in parts]


def unpackable(config: Any, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"Models of type {config.model_type!r} aren't supported: this one {reason}.",
        remedy="Choose a dense decoder such as a Llama, Qwen, Mistral, Gemma or GPT-2 model.",
    )


def load_with_transformers(
    folder: Path, *, dtype: torch.dtype, task: Task = "causal-lm", **source: Any
) -> PreTrainedModel:
    """Load a model with transformers and require every weight, because a missing one would be random. No pickle.

    A sequence classification head may be missing, since each job has its own. Heads for other tasks are ignored.
    Raises UnsupportedModel.
    """
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, "output_loading_info": True}
    if "gguf_file" in source:
        options["attn_implementation"] = "eager"  # the model is only saved, never run
    else:
        config = read_config(folder, task)
        refuse_quantized(config)
        options["attn_implementation"] = built_in_attention(config, task)
        if not weight_names(folder):
            raise refused("its folder contains no safetensors weights", remedy=TO_SAFETENSORS)
        options["use_safetensors"] = True
    try:
        loaded: Any = AUTO_MODELS[task].from_pretrained(
            folder, dtype=dtype, ignore_mismatched_sizes=task != "causal-lm", **options, **source
        )
    except RuntimeError as error:
        raise mismatch("a weight has a different shape") from error
    model, report = loaded
    mismatched = [*report["missing_keys"], *report["unexpected_keys"]]
    head = task_head_of(model)
    if head is not None:
        shapes = [key for key, *_ in report["mismatched_keys"]]
        mismatched = [name for name in [*report["missing_keys"], *shapes] if not name.startswith(f"{head.path}.")]
    if mismatched:
        raise mismatch(f"{mismatched[0]} is missing or unknown")
    return model


def mismatch(reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The base model's weights don't match its config.json: {reason}.",
        remedy="Import the base model again from a complete source.",
    )


def refused(reason: str, *, remedy: str = OTHER_MODEL) -> UnsupportedModel:
    return UnsupportedModel(f"The base model is not supported: {reason}.", remedy=remedy)

# pyright: basic
"""Turns a hub repository, a folder or a GGUF file into a base directory of safetensors and a tokenizer.

No pickle, no trust_remote_code, no auto_map: what can't be had without running its code is refused by name.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_core.errors import UnsupportedModel
from lora_core.tensor_files import read_header, write_directory

ALLOWED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


def import_base(
    *, source: str, kind: Literal["hub", "folder", "gguf"], revision: str | None, target_dir: Path
) -> None:
    """Make `target_dir` (which must not exist): config.json, generation_config.json, safetensors, tokenizer.

    fp32 stays fp32; everything else becomes bf16. The same source gives the same bytes. `revision` is a
    commit of the hub. Raises UnsupportedModel or UnsafeFile.
    """
    if kind == "gguf":
        path = Path(source)
        write_directory(target_dir, lambda directory: _write_gguf(path, directory))
        return
    folder = Path(source) if kind == "folder" else _download(source, revision)
    write_directory(target_dir, lambda directory: _write_folder(folder, directory))


def read_config(folder: Path) -> Any:
    """The config of a folder. Raises UnsupportedModel if it asks for code or isn't a causal LM."""
    refuse_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _refused(f"config.json of {folder.name!r} can't be read: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise _refused(f"{config.model_type!r} has no causal language model")
    return config


def refuse_code(folder: Path) -> None:
    """No file of the folder may name Python code to load."""
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith((".index.json", "tokenizer.json", "vocab.json")):
            continue
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise _refused(f"{path.name} is not valid JSON") from error
        if isinstance(content, dict) and "auto_map" in content:
            raise _refused(f"{path.name} has an auto_map, which means that it needs code of its own")


def _refused(reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"This base model is refused: {reason}.",
        remedy="Give a causal language model that transformers knows, as safetensors or GGUF.",
    )


def _download(repository: str, revision: str | None) -> Path:
    """A snapshot at one commit; without a revision, the newest commit now."""
    from huggingface_hub import HfApi, snapshot_download

    commit = revision or HfApi().model_info(repository).sha
    return Path(snapshot_download(repository, revision=commit, allow_patterns=ALLOWED_FILES))


def _write_folder(folder: Path, directory: Path) -> None:
    if not (folder / "config.json").is_file():
        raise _refused(f"{folder.name!r} has no config.json")
    config = read_config(folder)
    tensor_files = sorted(folder.glob("*.safetensors"))
    if not tensor_files:
        pickles = [path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")]]
        raise _refused(f"its weights are pickles ({pickles[0]})" if pickles else "it has no safetensors file")
    if getattr(config, "quantization_config", None) is not None:
        raise _refused("its weights are quantised")
    dtypes = {dtype for path in tensor_files for dtype, _ in read_header(path).values()}
    dtype = torch.float32 if dtypes == {"F32"} else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
    )
    _save_model(model, directory)
    _save_tokenizer(folder, directory)


def _write_gguf(path: Path, directory: Path) -> None:
    """Read from a folder that holds nothing else, so that no neighbour of the file can take part."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise _refused(f"{path.name} is not a GGUF file")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.bfloat16, local_files_only=True
        )
        _forget_quantisation(model)
        _save_model(model, directory)
        _save_tokenizer(Path(folder), directory, gguf_file="model.gguf")


def _forget_quantisation(model: Any) -> None:
    """transformers marks what it read from GGUF as quantised; the weights are plain by then."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def _save_model(model: Any, directory: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(directory, safe_serialization=True)


def _save_tokenizer(folder: Path, directory: Path, **source: str) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **source
        )
    except (OSError, ValueError, KeyError) as error:
        raise _refused("its tokenizer can't be read") from error
    tokenizer.save_pretrained(directory)

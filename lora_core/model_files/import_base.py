# pyright: basic
"""Converts a Hub repository, a folder or a GGUF file to a base folder of safetensors and a tokenizer.

Models that the engine can't train are rejected here, so that every imported base model is trainable.
"""

import errno
import glob
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from lora_core.base_model.loading import (
    COMPLETE,
    INDEX,
    SINGLE,
    TO_SAFETENSORS,
    load_with_transformers,
    read_config,
    refused,
    weight_names,
)
from lora_core.base_model.model import build_model, load_base
from lora_core.base_model.patching import Attachment
from lora_core.engine.invariance_probe import refuse_mixing
from lora_core.errors import UnreachableSource, UnsupportedModel
from lora_core.model_files.gguf import refuse_scaled_rotation, template_beside
from lora_core.model_files.license import CARD, license_of_folder, license_of_gguf
from lora_core.runtime.safetensors_io import read_header, write_directory

SENTENCEPIECE = "tokenizer.model"
"""The tokenizer in a format that transformers doesn't write, but llama.cpp's converter needs for models like Gemma."""
HUB_FILES = (
    *("config.json", "generation_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", SENTENCEPIECE, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/tool_use.jinja",
    CARD,
)
"""Files that are downloaded before the weights: no other subfolders, no other formats, no code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """Facts about a source: the commit of a Hub repository, and the license if the source states one."""

    commit: str | None
    license: str | None


def import_base(
    *,
    source: str,
    kind: Literal["hub", "folder", "gguf"],
    revision: str | None,
    chat_template: str | None = None,
    target_dir: Path,
) -> Imported:
    """Create `target_dir`, which must not exist, with config.json, generation_config.json, safetensors and tokenizer.

    fp32 weights stay fp32, all others become bf16. The same source gives the same bytes. `revision` is a commit, branch
    or tag on the Hub. `chat_template` replaces all templates of the source.

    Raises UnsupportedModel, UnreachableSource, UnsafeFile or OSError.
    """
    commit = None
    if kind == "gguf":
        path = Path(source)
        write_directory(target_dir, lambda directory: _write_gguf(path, directory, chat_template))
        return Imported(commit=None, license=license_of_gguf(path))
    folder = Path(source)
    if kind == "hub":
        folder, commit = _download(source, revision)
    write_directory(target_dir, lambda directory: _write_folder(folder, directory, chat_template))
    return Imported(commit=commit, license=license_of_folder(folder))


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Return (snapshot folder, commit). A branch or tag, or the default branch, is resolved to its current commit."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  (from its HTTP library)

    try:
        commit = revision
        if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
            commit = HfApi().model_info(repository, revision=revision).sha
        assert commit is not None, "the Hub reports a commit"
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=list(HUB_FILES)))
        _refuse_by_config(folder)
        snapshot_download(repository, revision=commit, allow_patterns=[SINGLE])
        if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            shards = [glob.escape(name) for name in weight_names(folder)]
            snapshot_download(repository, revision=commit, allow_patterns=shards)
        return folder, commit
    except UnsupportedModel:
        raise
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _unreachable(repository, revision, error) from error


def _unreachable(repository: str, revision: str | None, error: Exception) -> UnreachableSource:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    reasons: tuple[tuple[type[Exception], str, str], ...] = (
        (GatedRepoError, "it is gated", "Accept its terms on the Hub, and set HF_TOKEN on the worker."),
        (
            RepositoryNotFoundError,
            "it does not exist or is private",
            "Check the name. For a private repository, set HF_TOKEN on the worker.",
        ),
        (RevisionNotFoundError, "the revision does not exist", "Use an existing commit, branch or tag."),
        (HFValidationError, "the name is invalid", "Write it as OWNER/NAME."),
    )
    unreachable = (
        "the worker can't reach the Hub",
        "Check the network and HF_ENDPOINT. Without the Hub, add the model as a folder or a GGUF file, as described in "
        "docs/how-to/offline.md.",
    )
    found = next(((why, remedy) for kind, why, remedy in reasons if isinstance(error, kind)), unreachable)
    return UnreachableSource(
        f"Model {repository!r} at {revision or 'its newest commit'} can't be downloaded: {found[0]}.", remedy=found[1]
    )


def _refuse_by_config(folder: Path) -> None:
    """Reject a model by its config, before weights are downloaded or read."""
    if not (folder / "config.json").is_file():
        raise refused(f"the folder {folder.name!r} does not contain config.json", remedy=COMPLETE)
    config = read_config(folder)
    with torch.device("meta"):
        build_model(config)


def _write_folder(folder: Path, directory: Path, chat_template: str | None) -> None:
    if not folder.is_dir():
        raise UnreachableSource(
            f"The folder {str(folder)!r} does not exist on the worker.",
            remedy="Use the absolute path, as the worker sees it, of a folder with safetensors files. In a container, "
            "mount it, for example in /models. Names of GGUF files must end in .gguf.",
        )
    _refuse_by_config(folder)
    names = weight_names(folder)
    if not names:
        pickles = [path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")]]
        raise refused(
            f"its weights are pickle files ({pickles[0]}), which can run code when they are read"
            if pickles
            else f"it has no safetensors weights ({SINGLE} or {INDEX})",
            remedy=TO_SAFETENSORS,
        )
    dtypes = {dtype for name in names for dtype, _ in read_header(folder / name).values()}
    dtype = torch.float32 if dtypes == {"F32"} else torch.bfloat16
    _save_model(load_with_transformers(folder, dtype=dtype), directory)
    tokenizer = _tokenizer(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    if (folder / SENTENCEPIECE).is_file():
        shutil.copyfile(folder / SENTENCEPIECE, directory / SENTENCEPIECE)
    _refuse_untrainable(directory, dtype)


def _write_gguf(path: Path, directory: Path, chat_template: str | None) -> None:
    """Convert a GGUF file. Transformers reads it in a folder without other files, so that it loads none of them.

    Only a chat template next to the file is used, if the file has none.
    """
    if not path.is_file():
        raise UnreachableSource(
            f"The file {str(path)!r} does not exist on the worker.",
            remedy="Use the absolute path of a GGUF file as the worker sees it. In a container, that is a path in a "
            "mounted folder, such as /models.",
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise refused(
                f"{path.name} is not a GGUF file", remedy="Use a GGUF file, or a folder with safetensors files."
            )
    refuse_scaled_rotation(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        _save_model(_dequantized(Path(folder), "model.gguf"), directory)  # no reference remains, to free memory
        tokenizer = _tokenizer(Path(folder), gguf_file="model.gguf")
    if chat_template is None and tokenizer.chat_template is None:
        chat_template = template_beside(path)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    _refuse_untrainable(directory, torch.bfloat16)


def _dequantized(folder: Path, name: str) -> Any:
    """Load a GGUF file. transformers marks the model as quantized, although its weights are plain after loading."""
    model: Any = load_with_transformers(folder, dtype=torch.bfloat16, gguf_file=name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    return model


def _save_model(model: Any, directory: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(directory, safe_serialization=True)
    read_config(directory)


def _tokenizer(folder: Path, **source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **source)
    except (OSError, ValueError, KeyError) as error:
        raise refused(f"its tokenizer can't be read ({type(error).__name__})", remedy=COMPLETE) from error


def _refuse_untrainable(directory: Path, dtype: torch.dtype) -> None:
    """Load and test the written model as a trainer would. Otherwise every job on it would fail at the start."""
    base = load_base(directory, dtype="float32" if dtype == torch.float32 else "bfloat16", device="cpu")
    base.attachment = Attachment(base.model)
    refuse_mixing(base)

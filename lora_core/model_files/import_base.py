# pyright: basic
"""Turns a hub repository, a folder or a GGUF file into a base directory of safetensors and a tokenizer.

What the engine can't train is refused here, so that a base which is there is one that trains.
"""

import errno
import glob
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from lora_core.base_model.loading import INDEX, SINGLE, load_with_transformers, read_config, refused, weight_names
from lora_core.base_model.model import build_model, load_base
from lora_core.base_model.patching import Attachment
from lora_core.engine.invariance_probe import refuse_mixing
from lora_core.errors import UnreachableSource, UnsupportedModel
from lora_core.model_files.gguf import refuse_scaled_rotation
from lora_core.model_files.license import CARD, license_of_folder, license_of_gguf
from lora_core.runtime.safetensors_io import read_header, write_directory

HUB_FILES = (
    *("config.json", "generation_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    CARD,
)
"""What is fetched of a repository before its weights: no subfolder, no other format, no code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What a source tells beside its files: the commit that was read, of a hub; its license, where it names one."""

    commit: str | None
    license: str | None


def import_base(
    *, source: str, kind: Literal["hub", "folder", "gguf"], revision: str | None, target_dir: Path
) -> Imported:
    """Make `target_dir` (which must not exist): config.json, generation_config.json, safetensors, tokenizer.

    fp32 stays fp32; everything else becomes bf16. The same source gives the same bytes. `revision` is a
    commit, branch or tag of the hub. Raises UnsupportedModel, UnreachableSource or UnsafeFile.
    """
    commit = None
    if kind == "gguf":
        path = Path(source)
        write_directory(target_dir, lambda directory: _write_gguf(path, directory))
        return Imported(commit=None, license=license_of_gguf(path))
    folder = Path(source)
    if kind == "hub":
        folder, commit = _download(source, revision)
    write_directory(target_dir, lambda directory: _write_folder(folder, directory))
    return Imported(commit=commit, license=license_of_folder(folder))


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    """(snapshot, its commit): `revision` itself, or what it (or the default branch) points at now."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  (of its own HTTP library)

    try:
        commit = revision
        if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
            commit = HfApi().model_info(repository, revision=revision).sha
        assert commit is not None, "the hub names a commit"
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
        raise _not_given(repository, revision, error) from error


def _not_given(repository: str, revision: str | None, error: Exception) -> UnreachableSource:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    reasons: tuple[tuple[type[Exception], str, str], ...] = (
        (GatedRepoError, "it is gated", "Accept its terms on the hub, and set HF_TOKEN where the worker runs."),
        (
            RepositoryNotFoundError,
            "there is none, or it is private",
            "Check the name; for a private one set HF_TOKEN where the worker runs.",
        ),
        (RevisionNotFoundError, "it has no such revision", "Name a commit, branch or tag that it has."),
        (HFValidationError, "that is no name of a repository", "Write it as OWNER/NAME."),
    )
    unreachable = (
        "the hub can't be reached from the worker",
        "Check its network or HF_ENDPOINT, or give a folder or a GGUF file.",
    )
    found = next(((why, remedy) for kind, why, remedy in reasons if isinstance(error, kind)), unreachable)
    return UnreachableSource(
        f"The hub doesn't give {repository!r} at {revision or 'its newest commit'}: {found[0]}.", remedy=found[1]
    )


def _refuse_by_config(folder: Path) -> None:
    """Before a weight is fetched or read."""
    if not (folder / "config.json").is_file():
        raise refused(f"{folder.name!r} has no config.json")
    config = read_config(folder)
    with torch.device("meta"):
        build_model(config)


def _write_folder(folder: Path, directory: Path) -> None:
    if not folder.is_dir():
        raise UnreachableSource(
            f"There is no folder {str(folder)!r} where the worker runs.",
            remedy="Give the whole path of a folder of safetensors; a GGUF file's name ends in .gguf.",
        )
    _refuse_by_config(folder)
    names = weight_names(folder)
    if not names:
        pickles = [path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")]]
        raise refused(
            f"its weights are pickles ({pickles[0]})"
            if pickles
            else f"it has no safetensors weights ({SINGLE} or {INDEX})"
        )
    dtypes = {dtype for name in names for dtype, _ in read_header(folder / name).values()}
    dtype = torch.float32 if dtypes == {"F32"} else torch.bfloat16
    _save_model(load_with_transformers(folder, dtype=dtype), directory)
    _save_tokenizer(folder, directory)
    _refuse_untrainable(directory, dtype)


def _write_gguf(path: Path, directory: Path) -> None:
    """Read from a folder that holds nothing else, so that no neighbor of the file can take part."""
    if not path.is_file():
        raise UnreachableSource(
            f"There is no file {str(path)!r} where the worker runs.", remedy="Give the whole path of a GGUF file."
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise refused(f"{path.name} is not a GGUF file")
    refuse_scaled_rotation(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        _save_model(_dequantized(Path(folder), "model.gguf"), directory)  # held by no name: freed before the trial
        _save_tokenizer(Path(folder), directory, gguf_file="model.gguf")
    _refuse_untrainable(directory, torch.bfloat16)


def _dequantized(folder: Path, name: str) -> Any:
    """transformers marks what it read from GGUF as quantized; the weights are plain by then."""
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


def _save_tokenizer(folder: Path, directory: Path, **source: str) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **source)
    except (OSError, ValueError, KeyError) as error:
        raise refused("its tokenizer can't be read") from error
    tokenizer.save_pretrained(directory)


def _refuse_untrainable(directory: Path, dtype: torch.dtype) -> None:
    """Load what was written as a trainer does, and try it: else every job on this base would fail at its start."""
    base = load_base(directory, dtype="float32" if dtype == torch.float32 else "bfloat16", device="cpu")
    base.attachment = Attachment(base.model)
    refuse_mixing(base)

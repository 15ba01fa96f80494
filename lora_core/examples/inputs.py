# pyright: basic
"""Inputs of the examples: a base folder, created or imported, and a few sentences as tokens."""

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from lora_core.base_model.tiny_llama import tiny_llama
from lora_core.data.token_dataset import TokenDataset
from lora_core.errors import ConfigError
from lora_core.model_files.import_base import import_base

SENTENCES = (
    "The lorry left the harbor before dawn with forty crates of oranges.",
    "Water boils at one hundred degrees Celsius at sea level, and earlier in the mountains.",
    "The driver counted the change twice, because the first count was interrupted.",
    "A bridge that carries trains is tested with the heaviest train there is.",
)


def refuse_taken(out_dir: Path) -> None:
    """Raise ConfigError before training if the output folder isn't empty."""
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        remedy = "Choose another folder with --out, or delete this one."
        raise ConfigError(f"The output folder {str(out_dir)!r} is not empty.", remedy=remedy)


def base_folder(source: Path | None, scratch: Path) -> Path:
    """Return a base folder: `source` imported into `scratch`, or a tiny random Llama with bytes as tokens."""
    folder = scratch / "base"
    if source is None:
        tiny_llama().save_pretrained(folder)
    else:
        import_base(source=str(source), kind="gguf" if source.is_file() else "folder", revision=None, target_dir=folder)
    return folder


def text_rows(base_dir: Path) -> TokenDataset:
    """Return the sentences as rows, in which every token except the first is a label."""
    rows = [np.array(ids, np.int32) for ids in _token_ids(base_dir)]
    return TokenDataset(
        input_ids=np.concatenate(rows),
        loss_mask=np.concatenate([np.arange(len(row)) > 0 for row in rows]).astype(np.uint8),
        row_offsets=np.cumsum([0, *map(len, rows)]),
    )


def _token_ids(base_dir: Path) -> list[list[int]]:
    if (base_dir / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(base_dir, trust_remote_code=False, local_files_only=True)
        return [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    return [list(sentence.encode()) for sentence in SENTENCES]

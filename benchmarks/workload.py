"""The workload of every comparison: the same base model and rows for every contender."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_core.data.token_dataset import TokenDataset, rows_of_step

ROOT = Path(__file__).parents[1]
SEED = 0
LEARNING_RATE = 2e-4
NUM_ROWS = 512
LONGEST_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """`base` is a folder of safetensors and a tokenizer. `tokens` is a token file for TokenDataset."""

    base: Path
    model: str
    tokens: Path
    data: str
    num_tokens_per_row: float
    vocab_size: int
    texts: list[tuple[str, str]]
    """Question and answer of each row, before tokenization."""


def prepare(*, base: Path | None, data: Path | None, folder: Path) -> Workload:
    """Write the tokens to `folder`. The default base model is SmolLM2-135M-Instruct, which is downloaded once."""
    base = (base or fetched_base()).absolute()  # a trainer has another working directory
    texts = read_rows(data) if data else made_rows(NUM_ROWS)
    config = json.loads((base / "config.json").read_text("utf-8"))
    rows = tokenize(texts[:NUM_ROWS], base, longest=min(LONGEST_TOKENS, config["max_position_embeddings"]))
    path = write_tokens(rows, folder / "tokens.safetensors")
    return Workload(
        base=base,
        model=f"{config['architectures'][0]}, {config['num_hidden_layers']} layers of {config['hidden_size']}",
        tokens=path,
        data=data.name if data else "synthetic: additions, subtractions and products in words",
        num_tokens_per_row=float(np.mean([len(ids) for ids, _ in rows])),
        vocab_size=config["vocab_size"],
        texts=texts[:NUM_ROWS],
    )


def fetched_base() -> Path:
    """Import the default base model to .cache/bench/base, unless it exists."""
    target = ROOT / ".cache/bench/base"
    if not target.exists():
        sys.path.insert(0, str(ROOT / "examples"))
        from demo_parts.base_source import find  # pyright: ignore[reportMissingImports]

        from lora_core.model_files.import_base import import_base

        downloads = target.parent / "source"  # `find` creates a folder named base itself
        downloads.mkdir(parents=True, exist_ok=True)
        source = find(downloads)
        import_base(source=source.source, kind=source.kind, revision=source.revision, target_dir=target)
    return target


def read_rows(path: Path) -> list[tuple[str, str]]:
    """Return (question, answer) of each line of a JSONL file in the format of GSM8K."""
    lines = path.read_text("utf-8").splitlines()
    return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


def made_rows(count: int) -> list[tuple[str, str]]:
    """Generate word problems of various lengths with worked answers, about as long as GSM8K's. Deterministic."""
    choose = random.Random(SEED)
    return [_made_row(choose) for _ in range(count)]


def _made_row(choose: random.Random) -> tuple[str, str]:
    name, thing = choose.choice(("Ada", "Bram", "Chidi", "Dolores")), choose.choice(("crates", "wheels", "lamps"))
    total = choose.randint(10, 90)
    told, worked = [f"{name} starts the week with {total} {thing}."], []
    for day in range(choose.randint(1, 8)):
        number = choose.randint(2, 9)
        sign, verb = choose.choice((("+", "buys"), ("-", "gives away")))
        after = total + number if sign == "+" else total - number
        told.append(f"On day {day + 1} a lorry comes by, and {name} {verb} {number} of the {thing}.")
        worked.append(f"After day {day + 1} {name} has {total}{sign}{number} = {after} {thing}.")
        total = after
    question = " ".join([*told, f"How many {thing} does {name} have in the end?"])
    return question, "\n".join([*worked, f"#### {total}"])


def tokenize(texts: list[tuple[str, str]], base: Path, *, longest: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (input_ids, loss_mask) of each row. Only the answer is trained on. Rows that are too long are dropped."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for question, answer in texts:
        asked = tokenizer(f"Question: {question}\nAnswer: ")["input_ids"]
        answered = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(asked) + len(answered) <= longest:
            mask = np.array([0] * len(asked) + [1] * len(answered), np.uint8)
            rows.append((np.array([*asked, *answered], np.int32), mask))
    return rows


def write_tokens(rows: list[tuple[np.ndarray, np.ndarray]], path: Path) -> Path:
    """Write rows in the format of TokenDataset.load. Returns the path."""
    tensors = {
        "input_ids": np.concatenate([ids for ids, _ in rows]),
        "loss_mask": np.concatenate([mask for _, mask in rows]),
        "row_offsets": np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64),
    }
    save_file(tensors, path)
    return path


def batches(dataset: TokenDataset, *, batch_size: int, num_steps: int) -> list[list[dict[str, list[int]]]]:
    """Return the rows of each step in the order of the engine, for the other libraries."""
    return [
        [
            _as_lists(dataset, row)
            for row in rows_of_step(num_rows=dataset.num_rows, batch_size=batch_size, seed=SEED, step=step)
        ]
        for step in range(num_steps)
    ]


def _as_lists(dataset: TokenDataset, row: int) -> dict[str, list[int]]:
    ids, mask = dataset.row(row)
    return {
        "input_ids": ids.tolist(),
        "labels": np.where(mask == 1, ids, -100).tolist(),
        "completion_mask": mask.tolist(),
    }

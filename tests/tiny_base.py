"""A base model small enough for tests and real in every other way: random Llama, trained tokenizer, chat template.

`python -m tests.tiny_base FOLDER SEED` makes it in a child, so that a test's own process needs no torch.
The same call gives the same bytes: 2 layers, hidden 64, 320 tokens, float32.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 320
"""256 bytes, the special tokens and a few merges: a multiple of 64."""
MAX_POSITIONS = 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NOUNS = ("lorry", "crate", "bridge", "harbour", "engine", "wheel", "river", "market", "road", "signal")
COLORS = ("red", "green", "blue", "black", "white", "yellow")


def make(folder: Path, *, seed: int = 7) -> Path:
    """Create the base model in `folder`, in a child process, unless it exists."""
    if not (folder / "model.safetensors").exists():
        subprocess.run(
            [sys.executable, "-m", "tests.tiny_base", str(folder), str(seed)], check=True, cwd=Path(__file__).parents[1]
        )
    return folder


def without_end_of_turn(base: Path, folder: Path, *, template: str | None = None) -> Path:
    """Copy a base model whose token 0 is <|endoftext|>, and name that as the only end token in its files. So a chat
    template may end turns with another one, as in many models without instruction tuning. template: another one."""
    shutil.copytree(base, folder)
    changes: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"eos_token": SPECIAL[0]},
        "special_tokens_map.json": {"eos_token": SPECIAL[0]},
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {"eos_token_id": 0},
    }
    for path in (folder / name for name in changes):
        if path.is_file():
            path.write_text(json.dumps(json.loads(path.read_text()) | changes[path.name]))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def chat_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return short conversations of different lengths that a model can learn."""
    choose = random.Random(seed)
    return [_row(choose) for _ in range(count)]


def write_chat(path: Path, count: int, *, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(count, seed=seed)))
    return path


def write_pairs(path: Path, count: int, *, seed: int = 0) -> Path:
    """Return questions with two answers each. The answer that names the color is preferred."""
    rows: list[dict[str, Any]] = []
    for chat in chat_rows(count, seed=seed):
        question, answer = chat["messages"]
        worse = {"role": "assistant", "content": answer["content"].split(" is ")[0] + "."}
        rows.append({"input": {"messages": [question]}, "preferred_output": [answer], "non_preferred_output": [worse]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _row(choose: random.Random) -> dict[str, Any]:
    noun, color = choose.choice(NOUNS), choose.choice(COLORS)
    words = " ".join(choose.choices(NOUNS, k=choose.randint(1, 6)))
    return {
        "messages": [
            {"role": "user", "content": f"What color is the {noun}? {words}"},
            {"role": "assistant", "content": f"The {noun} is {color}."},
        ]
    }


def _build(folder: Path, seed: int = 7) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _build_tokenizer(folder)


def _build_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for row in chat_rows(400) for message in row["messages"]]
    tokenizer.train_from_iterator(["user assistant system", *texts], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[0],
        model_max_length=MAX_POSITIONS,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    _build(Path(sys.argv[1]), int(sys.argv[2]))

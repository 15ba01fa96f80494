"""Loads an adapter with PEFT, without Lorry, and compares its logits with the logits of training.

    python -I examples/check_adapter.py BASE_FOLDER ADAPTER_FOLDER [QUESTIONS.json]

Prints one JSON object: the largest difference over the adapter's probe, and the answers of the base model and the
adapter to each question. Both answer greedily, with the base model's chat template, which training used too, and with
at most ANSWER_TOKENS tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROBED_POSITIONS = 2
ROUNDING_FACTOR = 3
"""Rounding is measured on a few positions. In another program it may be larger by chance."""
ANSWER_TOKENS = 48
ASKED_AT_ONCE = 16
LORRYS_PACKAGES = ("lorry", "api", "catalog", "worker", "lora_core")


def main(base_folder: Path, adapter_folder: Path, questions: list[str]) -> dict[str, Any]:
    probe = load_file(adapter_folder / "probe.safetensors")
    base = load_base(base_folder, torch.bfloat16)
    base_logits = last_logits(base, probe["input_ids"])
    adapted = PeftModel.from_pretrained(base, str(adapter_folder)).eval()
    logits = last_logits(adapted, probe["input_ids"])
    exact = PeftModel.from_pretrained(load_base(base_folder, torch.float32), str(adapter_folder)).eval()
    exact_logits = last_logits(exact, probe["input_ids"])
    # Two correct programs differ by rounding only. It is measured twice, because an adapter with a large effect also
    # magnifies rounding: without the adapter, between the two programs; with it, between bfloat16 and float32.
    rounding = max(difference(base_logits, probe["base_logits"]), difference(logits, exact_logits))
    largest = float(probe["logits"].abs().max())
    tolerance = ROUNDING_FACTOR * max(rounding, torch.finfo(torch.bfloat16).eps * largest / 2)
    found = difference(logits, probe["logits"])
    tokenizer = tokenizer_of(base_folder)
    starts = range(0, len(questions), ASKED_AT_ONCE)
    answers = [one for start in starts for one in ask(adapted, tokenizer, questions[start : start + ASKED_AT_ONCE])]
    imported = sorted(set(LORRYS_PACKAGES) & sys.modules.keys())
    return {
        "max_abs_diff": found,
        "rounding": rounding,
        "tolerance": tolerance,
        "max_abs_logit": largest,
        "max_abs_effect": difference(probe["logits"], probe["base_logits"]),
        "agrees": found <= tolerance,
        "imported_of_lorry": imported,
        "answers": answers,
    }


def load_base(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@torch.no_grad()
def last_logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, positions, vocabulary]."""
    return model(input_ids=input_ids, use_cache=False).logits[:, -PROBED_POSITIONS:].float()


def tokenizer_of(base_folder: Path) -> Any:
    """Return a tokenizer that pads on the left: the answers of a batch start at one position."""
    return AutoTokenizer.from_pretrained(base_folder, padding_side="left")


def ask(model: PeftModel, tokenizer: Any, questions: list[str]) -> list[dict[str, Any]]:
    """Return the texts of `base` and `adapter` to each question. `ended`: before the limit ANSWER_TOKENS."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    adapter = generate(model, tokenizer, inputs)
    with model.disable_adapter():
        base = generate(model, tokenizer, inputs)
    return [{"question": q, "base": b, "adapter": a} for q, b, a in zip(questions, base, adapter, strict=True)]


@torch.no_grad()
def generate(model: PeftModel, tokenizer: Any, inputs: Any) -> list[dict[str, Any]]:
    """Generate greedily, which is deterministic."""
    made = model.generate(
        **inputs,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    answers = made[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    ended = (answers == tokenizer.eos_token_id).any(dim=1).tolist()
    return [{"text": text.strip(), "ended": end} for text, end in zip(texts, ended, strict=True)]


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[3]).read_text("utf-8")) if len(sys.argv) > 3 else []
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), wanted)))

"""Loads an adapter with PEFT alone, and compares its logits with what training saw. Nothing of Lorry is imported.

    python -I examples/check_adapter.py BASE_FOLDER ADAPTER_FOLDER [QUESTIONS.json]

Prints one JSON object: the largest difference over the probe that came with the adapter, and, for each
question, what the base and the adapter answer.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROBED_POSITIONS = 2
ANSWER_TOKENS = 40
LORRYS_PACKAGES = ("lorry", "api", "catalog", "worker", "lora_core")


def main(base_folder: Path, adapter_folder: Path, questions: list[str]) -> dict[str, Any]:
    probe = load_file(adapter_folder / "probe.safetensors")
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    base_logits = last_logits(base, probe["input_ids"])
    adapted = PeftModel.from_pretrained(base, str(adapter_folder)).eval()
    # Where no adapter is involved, the two programs differ by rounding alone; with it, by twice that at most.
    largest = float(probe["logits"].abs().max())
    rounding = difference(base_logits, probe["base_logits"])
    tolerance = 2 * max(rounding, torch.finfo(torch.bfloat16).eps * largest / 2)
    found = difference(last_logits(adapted, probe["input_ids"]), probe["logits"])
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    answers = [
        {
            "question": question,
            "base": answer(adapted, tokenizer, question, with_adapter=False),
            "adapter": answer(adapted, tokenizer, question, with_adapter=True),
        }
        for question in questions
    ]
    imported = sorted(set(LORRYS_PACKAGES) & sys.modules.keys())
    return {
        "max_abs_diff": found,
        "tolerance": tolerance,
        "max_abs_logit": largest,
        "max_abs_effect": difference(probe["logits"], probe["base_logits"]),
        "agrees": found <= tolerance,
        "imported_of_lorry": imported,
        "answers": answers,
    }


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@torch.no_grad()
def last_logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, positions, vocabulary]."""
    return model(input_ids=input_ids, use_cache=False).logits[:, -PROBED_POSITIONS:].float()


@torch.no_grad()
def answer(model: PeftModel, tokenizer: Any, question: str, *, with_adapter: bool) -> str:
    """Greedy, so that it is the same every time."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with nullcontext() if with_adapter else model.disable_adapter():
        made = model.generate(
            **inputs,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[3]).read_text("utf-8")) if len(sys.argv) > 3 else []
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), wanted)))

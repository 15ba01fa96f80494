"""check_adapter compares logits within rounding, and prompts both models with the template of training."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from catalog.datasets.chat import Chat
from tests import tiny_base
from worker.children.tokenizer.chat_template import ChatTemplate

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import check_adapter  # pyright: ignore[reportMissingImports]

ROWS = [row["messages"] for row in tiny_base.chat_rows(4)]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # raised inside PEFT
QUESTIONS = [question["content"] for question, _answer in ROWS]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.make(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def tokenizer(base_dir: Path) -> Any:
    return check_adapter.tokenizer_of(base_dir)


def test_prompt_is_a_prefix_of_the_training_text(
    base_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def generate(_model: object, _tokenizer: object, inputs: Any) -> list[dict[str, Any]]:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        seen.extend(ids[mask.bool()].tolist() for ids, mask in pairs)
        return [{}] * len(inputs["input_ids"])

    monkeypatch.setattr(check_adapter, "generate", generate)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), LoraConfig(r=2))

    check_adapter.ask(model, tokenizer, QUESTIONS)

    template = ChatTemplate.load(base_dir)
    for ids, row in zip(seen[: len(ROWS)], ROWS, strict=True):
        trained = template.render_supervised(Chat(row))
        ((start, end),) = trained.spans
        assert tokenizer.decode(ids) == trained.text[:start]
        assert trained.text[start:end].startswith(f"{row[1]['content']}{tokenizer.eos_token}")


def test_batched_answers_equal_single_answers(base_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_adapter, "ANSWER_TOKENS", 8)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), lora).eval()

    together = check_adapter.ask(model, tokenizer, QUESTIONS)

    assert together == [check_adapter.ask(model, tokenizer, [question])[0] for question in QUESTIONS]
    assert all(one["base"] != one["adapter"] for one in together)


def test_answer_reports_whether_its_turn_ended(tokenizer: Any) -> None:
    prompt, answer, end = 5, tokenizer.encode("red", add_special_tokens=False), tokenizer.eos_token_id
    rows = [[prompt, *answer, end, end], [prompt, *answer, *answer, *answer]]
    made = torch.tensor([row[: len(answer) * 3 + 1] + [end] * (len(answer) * 3 + 1 - len(row)) for row in rows])
    model: Any = SimpleNamespace(generate=lambda **_options: made)

    first, second = check_adapter.generate(model, tokenizer, {"input_ids": made[:, :1]})

    assert first == {"text": "red", "ended": True}
    assert second == {"text": "redredred", "ended": False}


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (0.5, False), (1.5, False)])
def test_adapter_that_magnifies_rounding_agrees_and_a_wrong_one_does_not(
    base_dir: Path, tmp_path: Path, factor: float, agrees: bool
) -> None:
    write_adapter(base_dir, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    changed = {name: tensor * factor if "lora_B" in name else tensor for name, tensor in weights.items()}
    save_file(changed, tmp_path / "adapter_model.safetensors")

    checked = check_adapter.main(base_dir, tmp_path, [])

    assert checked["agrees"] is agrees
    spacing = torch.finfo(torch.bfloat16).eps * checked["max_abs_logit"]
    assert checked["max_abs_diff"] > spacing, "rounding without the adapter must not explain the difference"
    assert checked["tolerance"] < checked["max_abs_effect"]


def write_adapter(base_dir: Path, folder: Path) -> None:
    """Write a random adapter with a large effect and its probe, whose LoRA runs in bfloat16 as in training."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, tiny_base.VOCABULARY, (2, 48))
    base_logits = check_adapter.last_logits(model, ids)
    lora = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(model, lora).save_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    trained = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).to(torch.bfloat16).eval()
    probe = {"input_ids": ids, "base_logits": base_logits, "logits": check_adapter.last_logits(trained, ids)}
    save_file(probe, folder / "probe.safetensors")

"""check_adapter prompts base model and adapter with the template of training, until the end of the turn."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
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

"""Base and adapter are asked as training was: by the same template, until they end their turn."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny_base
from worker.children.tokenizer.chat_template import ChatTemplate

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import check_adapter  # pyright: ignore[reportMissingImports]

ROWS = [row["messages"] for row in tiny_base.chat_rows(4)]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
QUESTIONS = [question["content"] for question, _answer in ROWS]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.make(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def tokenizer(base_dir: Path) -> Any:
    return check_adapter.tokenizer_of(base_dir)


def test_a_question_is_the_beginning_of_what_training_saw(
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
        trained = template.render_supervised(row)
        ((start, end),) = trained.spans
        assert tokenizer.decode(ids) == trained.text[:start]
        assert trained.text[start:end].startswith(f"{row[1]['content']}{tokenizer.eos_token}")


def test_an_answer_is_the_same_in_company(base_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_adapter, "ANSWER_TOKENS", 8)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), lora).eval()

    together = check_adapter.ask(model, tokenizer, QUESTIONS)

    assert together == [check_adapter.ask(model, tokenizer, [question])[0] for question in QUESTIONS]
    assert all(one["base"] != one["adapter"] for one in together)


def test_an_answer_ends_with_its_turn_and_says_if_it_did_not(tokenizer: Any) -> None:
    prompt, said, end = 5, tokenizer.encode("red", add_special_tokens=False), tokenizer.eos_token_id
    rows = [[prompt, *said, end, end], [prompt, *said, *said, *said]]
    made = torch.tensor([row[: len(said) * 3 + 1] + [end] * (len(said) * 3 + 1 - len(row)) for row in rows])
    model: Any = SimpleNamespace(generate=lambda **_options: made)

    first, second = check_adapter.generate(model, tokenizer, {"input_ids": made[:, :1]})

    assert first == {"text": "red", "ended": True}
    assert second == {"text": "redredred", "ended": False}

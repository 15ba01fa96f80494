"""Tokenization of prompts with completions and of plain texts: tokens as in transformers, and those trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from tests.worker.chat_bases import MARKED, SMOLLM2, Base, turns

BEGIN, END = "<|endoftext|>", "<|im_end|>"
TEXTS = (
    "a b c",
    "Grüße, 世界 😀",
    " leading\nand trailing \n",
    f"contains {END} itself",
    f"ends with {END}",
    "ends with whitespace  ",
)


@pytest.fixture(scope="module")
def beginning_json(tokenizer_json: str) -> str:
    """Return the same tokenizer, configured to begin each text with a token."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    ident = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, ident)])
    return tokenizer.to_str()


@pytest.fixture
def plain(tmp_path: Path, tokenizer_json: str) -> Base:
    """Return a base without a chat template."""
    return Base(tmp_path / "base", tokenizer_json, None)


@pytest.fixture
def beginning(tmp_path: Path, beginning_json: str) -> Base:
    return Base(tmp_path / "base", beginning_json, None)


def configure(base: Base, **values: Any) -> None:
    path = base.folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "unset"}))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_trained_on_except_its_first_token_and_ends_once(beginning: Base, text: str) -> None:
    ((ids, mask),) = beginning.rows({"text": text})

    expected: list[int] = list(beginning.reference()(text)["input_ids"])
    end = beginning.reference().convert_tokens_to_ids(END)
    assert ids == (expected if expected[-1] == end else [*expected, end])
    assert mask == [0] + [1] * (len(ids) - 1)


def test_a_completion_and_the_end_token_are_trained_on_and_the_prompt_is_not(beginning: Base) -> None:
    ((ids, mask),) = beginning.rows({"prompt": "What is 2 + 2?\n", "completion": "It is 4."})

    reference = beginning.reference()
    assert reference.decode([ident for ident, one in zip(ids, mask, strict=True) if one]) == f"It is 4.{END}"
    prompt = list(reference("What is 2 + 2?\n")["input_ids"])
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


def test_without_a_bos_token_the_first_token_of_a_text_is_not_trained_on(plain: Base) -> None:
    ((ids, mask),) = plain.rows({"prompt": "", "completion": "b c"})

    assert mask == [0] + [1] * (len(ids) - 1)


@pytest.mark.parametrize("has_processor", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}], ids=str
)
def test_special_tokens_around_a_text_equal_those_of_transformers(
    plain: Base, beginning_json: str, options: dict[str, bool], has_processor: bool
) -> None:
    tokenizer = json.loads(beginning_json)
    (plain.folder / "tokenizer.json").write_text(
        json.dumps(tokenizer if has_processor else {**tokenizer, "post_processor": None})
    )
    configure(plain, **options)

    ((ids, _),) = plain.rows({"text": "a b c"})

    expected = list(plain.reference()("a b c")["input_ids"])
    end = plain.reference().convert_tokens_to_ids(END)
    assert ids == (expected if expected[-1] == end else [*expected, end])


@pytest.mark.parametrize(
    ("model", "end"), [({"eos_token_id": 0}, BEGIN), ({"eos_token_id": [0, 2]}, BEGIN), ({}, None)], ids=str
)
def test_the_end_token_falls_back_to_the_model_configuration(
    plain: Base, model: dict[str, Any], end: str | None
) -> None:
    configure(plain, eos_token="unset")
    (plain.folder / "config.json").write_text(json.dumps({"vocab_size": 400, **model}))

    ((ids, mask),) = plain.rows({"text": "a b c"})
    report, _ = plain.prepare({"text": "a b c"})

    assert report.get("ends_with") == end
    assert plain.reference().decode(ids) == "a b c" + (end or "")
    assert mask == [0] + [1] * (len(ids) - 1)


def test_a_prompt_and_a_completion_of_messages_form_a_chat(tmp_path: Path, tokenizer_json: str) -> None:
    base = Base(tmp_path / "base", tokenizer_json, MARKED)
    chat = turns("a", "b", "c", "d")

    assert base.trained_text({"prompt": chat[:3], "completion": chat[3:]}) == f"d{END}"
    ((ids, _),) = base.rows({"prompt": chat[:3], "completion": chat[3:]})
    assert ids == base.rows(chat)[0][0]


def test_only_rows_of_messages_need_a_chat_template(plain: Base) -> None:
    messages = {"prompt": turns("a"), "completion": [{"role": "assistant", "content": "b"}]}

    refused = plain.prepare({"prompt": "a", "completion": "b"}, messages)[0].get("refusal")

    assert refused is not None
    assert refused["code"] == "base_has_no_chat_template"
    assert '{"text": "..."}' in refused["remedy"]


def test_the_report_shows_the_kind_and_the_tokens_around_a_text(beginning: Base, tmp_path: Path) -> None:
    report, _ = beginning.prepare({"text": "a"}, {"text": "b c"})
    assert (report.get("kind"), report.get("opens_with"), report.get("ends_with")) == ("text", BEGIN, END)
    assert "chat_template" not in report

    report, _ = beginning.prepare({"prompt": "a", "completion": "b"})
    assert (report.get("kind"), report.get("ends_with")) == ("completion", END)

    (beginning.folder / "chat_template.jinja").write_text(SMOLLM2)
    report, _ = beginning.prepare(turns("a", "b"))
    assert report.get("kind") == "chat"
    assert "chat_template" in report
    assert "ends_with" not in report


def test_texts_of_one_token_are_rejected_together(plain: Base) -> None:
    configure(plain, eos_token="unset")

    refused = plain.prepare({"text": "a"}, {"text": "b"})[0].get("refusal")

    assert refused is not None
    assert refused["message"] == (
        "None of the 2 texts has trainable tokens: the first token of a text is never trained on."
    )


def test_a_tokenizer_may_have_no_bos_token(plain: Base) -> None:
    assert plain.prepare({"text": "a b"})[0].get("opens_with", "unset") is None

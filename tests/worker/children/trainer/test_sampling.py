"""Conversion of prompts to tokens and of answers to text, by the conventions of the base model."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from catalog.spec.training import Samples
from tests.worker.chat_bases import INSTRUCT, MARKED, SMOLLM2, Base, turns
from worker.children.tokenizer.chat_template import Refused
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.trainer.outputs import sample_records, sample_request

SAMPLES = Samples(prompts=["What is 2 + 2?", "b"], max_tokens=5)
END = "<|im_end|>"


@pytest.mark.parametrize("template", [SMOLLM2, MARKED, INSTRUCT], ids=["smollm2", "marked", "instruct"])
def test_a_chat_prompt_is_a_user_turn_and_its_answer_ends_with_the_turn(make_base: Any, template: str) -> None:
    base: Base = make_base(template)
    configured = json.loads((base.folder / "tokenizer_config.json").read_text())
    (base.folder / "tokenizer_config.json").write_text(
        json.dumps({**configured, "eos_token": END if template is INSTRUCT else "<|endoftext|>"})
    )

    request = sample_request(BaseText(base.folder), SAMPLES, as_chat=True)

    reference = base.reference()
    rendered = reference.apply_chat_template(turns("What is 2 + 2?"), add_generation_prompt=True, return_dict=False)
    assert list(request.ids[0]) == rendered
    assert reference.convert_tokens_to_ids(END) in request.end_ids
    assert reference.eos_token_id in request.end_ids


def test_a_plain_text_prompt_has_no_end_token(make_base: Any) -> None:
    base: Base = make_base(None)
    tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    ids = [(text, tokenizer.token_to_id(text)) for text in ("<|endoftext|>", END)]
    around = processors.TemplateProcessing(single=f"<|endoftext|> $A {END}", special_tokens=ids)
    tokenizer.post_processor = around
    tokenizer.save(str(base.folder / "tokenizer.json"))

    request = sample_request(BaseText(base.folder), SAMPLES, as_chat=False)

    assert list(request.ids[1]) == base.reference()("b")["input_ids"][:-1]
    assert list(request.end_ids) == [base.reference().eos_token_id]


def test_answers_omit_special_tokens_and_show_whether_they_ended(make_base: Any) -> None:
    base: Base = make_base(None)
    text = BaseText(base.folder)
    ids = tuple(base.reference()("Hello there!")["input_ids"])
    end = base.reference().eos_token_id
    assert isinstance(end, int)

    found = sample_records(text, sample_request(text, SAMPLES, as_chat=False), [(*ids, end), ids])

    assert [(each["prompt"], each["answer"], each["is_complete"]) for each in found] == [
        ("What is 2 + 2?", "Hello there!", True),
        ("b", "Hello there!", False),
    ]
    assert found[0]["num_tokens"] == len(ids) + 1


def test_a_prompt_that_the_template_rejects_is_rejected(make_base: Any) -> None:
    with pytest.raises(Refused):
        sample_request(BaseText(make_base("{{ raise_exception('no') }}").folder), SAMPLES, as_chat=True)

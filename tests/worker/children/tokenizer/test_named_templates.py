"""Chat templates that are given by name: they render conversations as their publishers' templates do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from catalog.datasets.chat import Chat, check_chat
from catalog.datasets.chat_templates import TEMPLATES
from catalog.error_texts import templates
from tests.worker.chat_bases import CHATS, Base, Messages, turns
from tests.worker.children.tokenizer.test_published_templates import published
from worker.children.tokenizer.chat_template import ChatTemplate, Refused

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ANSWERED = {name: chat for name, chat in CHATS.items() if chat[-1]["role"] == "assistant"}


def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], TOKENS)


def chat_of(messages: Messages) -> Chat:
    return check_chat({"messages": [dict(message) for message in messages]})


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize(("name", "publisher"), [("gemma", "gemma3"), ("llama3", "llama3"), ("chatml", "qwen2_5")])
def test_conversation_has_the_text_of_the_published_template(name: str, publisher: str, chat: Messages) -> None:
    given = chat if name != "chatml" or chat[0]["role"] == "system" else turns("", system="Be brief.")[:1] + chat
    theirs = ChatTemplate(published(publisher), TOKENS)

    for add_generation_prompt in (False, True):
        found = template(name).render(chat_of(given), add_generation_prompt=add_generation_prompt)
        assert found == theirs.render(chat_of(given), add_generation_prompt=add_generation_prompt)


def test_zephyr_has_the_published_format() -> None:
    chat = chat_of(turns("Hi", "Hello", system="Be brief."))

    found = template("zephyr").render(chat, add_generation_prompt=True)

    assert found == "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|assistant|>\n"


@pytest.mark.parametrize("chat", ANSWERED.values(), ids=ANSWERED)
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_found_in_the_text(name: str, chat: Messages) -> None:
    rendered = template(name).render_supervised(chat_of(chat))

    answers = [message["content"].strip() for message in chat if message["role"] == "assistant"]
    found = [rendered.text[start:stop] for start, stop in rendered.spans]
    assert len(found) == len(answers)
    assert all(span.lstrip().startswith(answer) for span, answer in zip(found, answers, strict=True))


def test_gemma_rejects_two_messages_of_the_user() -> None:
    with pytest.raises(Refused, match="user and the assistant must alternate"):
        template("gemma").render(chat_of([*turns("a"), *turns("b", "c")]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_templates_that_render_tools_are_offered_for_rows_with_tools(name: str) -> None:
    given = Chat(chat_of(turns("a", "b")).messages, [{"type": "function", "function": {"name": "now"}}])
    remedy = templates()["template_without_tools"].remedy
    offered = remedy.partition("--chat-template ")[2].partition("`")[0].split("|")

    if name in offered:
        template(name).render_supervised(given)
    else:
        with pytest.raises(Refused, match="does not render tools"):
            template(name).render_supervised(given)
    assert "FILE" in offered


@pytest.mark.parametrize("name", ["chatml", "zephyr"])
def test_answers_are_trained_up_to_the_token_that_ends_them(make_base: Callable[[str | None], Base], name: str) -> None:
    base = make_base(TEMPLATES[name])

    assert base.trained_text(turns("a", "b", "c", "d")) == "b<|im_end|>|d<|im_end|>"

"""Published chat templates, also those given by name: rows and calls have the tokens of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from catalog.datasets.chat import Chat, check_chat
from catalog.datasets.chat_templates import TEMPLATES
from catalog.error_texts import templates
from tests.worker.chat_bases import CHATS, MARKED, SMOLLM2, Base, Messages, turns
from tests.worker.children.tokenizer.test_tool_calls import CHAT, HERMES, MARKED_CALLS, TOOLS, USER, call, parsed
from worker.children.tokenizer.chat_template import ChatTemplate, Refused
from worker.children.tokenizer.text_encoder import BaseText

DOCUMENT = Path(__file__).parents[4] / "docs" / "reference" / "data-formats.md"
MISTRAL = """{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set shown = messages[1:] %}
{%- else %}
    {%- set shown = messages %}
{%- endif %}
{%- set asked = shown | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in shown %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == asked[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + '[/INST]' }}
        {%- endif %}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids of calls need 9 characters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- else %}
        {%- if message.tool_call_id|length != 9 %}{{- raise_exception('ids of calls need 9 characters') }}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
SPLIT = "Use one row for each assistant message: the row ends with it, and has weight 0 on earlier ones."
THINKS = "<think>\n\n</think>\n\n"
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "c"}}\n</tool_call>'
ONE_CALL: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "tool_calls": [call(1, city="c")]},
    {"role": "tool", "tool_call_id": "call_1", "content": "d"},
    {"role": "assistant", "content": "f"},
]


def published(name: str) -> str:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def with_ids(messages: list[dict[str, Any]], ids: dict[str, str]) -> list[dict[str, Any]]:
    """Return the messages with other ids of calls."""
    text = json.dumps(messages)
    for before, after in ids.items():
        text = text.replace(before, after)
    return json.loads(text)


def asked(messages: list[dict[str, Any]], tools: list[Any] | None = TOOLS) -> Chat:
    """Return the conversation of a request."""
    return Chat(
        check_chat({"messages": json.loads(json.dumps([*messages, {"role": "assistant", "content": "."}]))}).messages[
            :-1
        ],
        tools,
    )


def refusal(base: Base, messages: list[dict[str, Any]], tools: list[Any] | None = TOOLS) -> Any:
    row = {"messages": messages} if tools is None else {"messages": messages, "tools": tools}
    found = base.prepare(row)[0].get("refusal")
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3_1", "llama3_2"])
def test_documented_row_with_a_call_has_the_tokens_of_transformers(make_base: Any, name: str) -> None:
    lines = DOCUMENT.read_text("utf-8").splitlines()
    row: dict[str, Any] = json.loads(next(line for line in lines if line.startswith("{") and '"tool_calls"' in line))
    base: Base = make_base(published(name))

    ((ids, _),) = base.rows(row)
    trained = base.trained_text(row)

    messages = parsed(row["messages"])
    messages = [{"content": "", **message} for message in messages]
    assert ids == base.reference().apply_chat_template(
        messages, tools=row["tools"], return_dict=False, date_string="26 Jul 2024"
    )
    assert "get_weather" in trained
    assert "It is 21 °C." in trained


def test_ids_of_calls_are_rendered_as_nine_characters_if_the_template_requires_it(make_base: Any) -> None:
    base: Base = make_base(MISTRAL)
    answered = with_ids(CHAT, {"call_1": "call_0123456789abcdef01234567"})

    (ids, mask), (others, _) = base.rows({"messages": CHAT, "tools": TOOLS}, {"messages": answered, "tools": TOOLS})

    text = str(base.reference().decode(ids))
    shown = [text.split(mark)[1][:9] for mark in ('"id": "', '"call_id": "')]
    assert shown[0] == shown[1]
    assert shown[0].isalnum()
    assert len({part[:9] for part in text.split('"id": "')[1:]}) == 2, "each call keeps an id of its own"
    assert ids != others, "another id is rendered differently"
    assert "[TOOL_CALLS]" in str(base.reference().decode([i for i, m in zip(ids, mask, strict=True) if m]))


def test_ids_of_nine_characters_are_kept(make_base: Any) -> None:
    base: Base = make_base(MISTRAL)
    chat = with_ids(CHAT, {"call_1": "aB3dE6gH9", "call_2": "123456789"})

    ((ids, _),) = base.rows({"messages": chat, "tools": TOOLS})

    assert ids == base.reference().apply_chat_template(parsed(chat), tools=TOOLS, return_dict=False)


@pytest.mark.parametrize("ident", ["call_1", "call_0123456789abcdef01234567", "aB3dE6gH9"])
def test_prompt_of_a_request_is_the_beginning_of_the_row(make_base: Any, ident: str) -> None:
    base: Base = make_base(MISTRAL)
    chat = with_ids(ONE_CALL, {"call_1": ident})

    ((ids, _),) = base.rows({"messages": chat, "tools": TOOLS})
    prompt = BaseText(base.folder).chat_ids(asked(chat[:-1]))

    assert tuple(ids[: len(prompt)]) == prompt


def test_deprecated_function_calls_get_a_valid_id(make_base: Any) -> None:
    base: Base = make_base(MISTRAL)
    function = {"name": "weather", "arguments": "{}"}
    chat = [
        USER,
        {"role": "assistant", "function_call": function},
        {"role": "function", "name": "weather", "content": "d"},
    ]

    trained = base.trained_text({"messages": chat, "functions": [TOOLS[0]["function"]]})

    assert trained.startswith('[TOOL_CALLS] [{"name": "weather", "arguments": {}, "id": "')


def test_error_names_a_system_message_that_the_template_drops(make_base: Any) -> None:
    base: Base = make_base(MISTRAL)

    found = refusal(base, turns("a", "b", system="s"), tools=None)

    assert found["code"] == "unusable_chat_template"
    assert "renders the system message only in the last message of a conversation" in found["message"]
    assert "at the start of the user's first message" in found["remedy"]
    assert base.trained_text(turns("s\n\na", "b")) == " b<|im_end|>"


def test_error_names_tools_that_the_template_moves(make_base: Any) -> None:
    base: Base = make_base(MISTRAL)
    chat = turns("a", "b", "c", "d")

    found = refusal(base, chat)

    assert found["code"] == "unusable_chat_template"
    assert "renders the tools only before the user's last message" in found["message"]
    assert SPLIT in found["remedy"]
    masked = [chat[0], {**chat[1], "weight": 0}, *chat[2:]]
    assert base.trained_text({"messages": chat[:2], "tools": TOOLS}) == " b<|im_end|>"
    assert base.trained_text({"messages": masked, "tools": TOOLS}) == " d<|im_end|>"


def test_error_names_the_think_block_of_qwen3_and_its_remedy_trains_every_answer(make_base: Any) -> None:
    base: Base = make_base(published("qwen3"))

    found = refusal(base, ONE_CALL)

    assert found["code"] == "unusable_chat_template"
    assert "renders message 2 without its <think> block once other messages follow it" in found["message"]
    assert SPLIT in found["remedy"]
    masked = [USER, {**ONE_CALL[1], "weight": 0}, *ONE_CALL[2:]]
    assert base.trained_text({"messages": ONE_CALL[:2], "tools": TOOLS}) == f"{THINKS}{CALLED}<|im_end|>"
    assert base.trained_text({"messages": masked, "tools": TOOLS}) == f"{THINKS}f<|im_end|>"


def test_a_prompt_that_shows_no_tools_does_not_affect_later_prompts(make_base: Any) -> None:
    base: Base = make_base(MISTRAL)
    text = BaseText(base.folder)

    with pytest.raises(Refused, match="does not render tools"):
        text.chat_ids(asked([{"role": "system", "content": "s"}]))

    assert "AVAILABLE_TOOLS" in text.text_of(text.chat_ids(asked([USER])))


def place_in_config(base: Base, template: str, tool_use: str) -> None:
    (base.folder / "chat_template.jinja").unlink()
    path = base.folder / "tokenizer_config.json"
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": tool_use}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))


def place_in_folder(base: Base, _: str, tool_use: str) -> None:
    (base.folder / "additional_chat_templates").mkdir()
    (base.folder / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)


@pytest.mark.parametrize("place", [place_in_config, place_in_folder])
@pytest.mark.parametrize(
    ("template", "tool_use"), [(SMOLLM2, MARKED_CALLS), (MARKED, HERMES)], ids=["marks", "prefixes"]
)
def test_conversations_with_tools_use_the_template_for_tools(
    make_base: Any, place: Any, template: str, tool_use: str
) -> None:
    base: Base = make_base(template)
    place(base, template, tool_use)
    plain, with_tools = turns("a", "b"), {"messages": CHAT, "tools": TOOLS}

    (without, _), (ids, _) = base.rows(plain, with_tools)

    reference = base.reference()
    assert without == reference.apply_chat_template(plain, return_dict=False)
    assert ids == reference.apply_chat_template(parsed(CHAT), tools=TOOLS, return_dict=False)
    trained = base.trained_text(with_tools)
    assert "weather" in trained
    assert trained.endswith("f<|im_end|>")
    assert base.trained_text(plain) == "b<|im_end|>"
    assert base.prepare(plain, with_tools)[0].get("answers_by") == "generation blocks and prefixes"
    prompt = BaseText(base.folder).chat_ids(asked([USER]))
    assert list(prompt) == reference.apply_chat_template(
        [USER], tools=TOOLS, add_generation_prompt=True, return_dict=False
    )


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

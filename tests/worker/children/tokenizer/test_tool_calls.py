"""Rows with tool calls: the template renders tools and calls as in transformers, and the calls are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from catalog.datasets.chat_templates import TEMPLATES
from lora_core.data.token_dataset import TokenDataset
from tests.worker.chat_bases import MARKED, SMOLLM2, Base
from worker.children.tokenizer.chat_template import TOOL_USE, describe_templates

HERMES = TEMPLATES["chatml"]
"""The format of Hermes and Qwen."""
MARKED_CALLS = MARKED.replace(
    "{{- message.content + '<|im_end|>' }}{%- endgeneration %}",
    "{{- message.content }}{%- for call in message.tool_calls or [] %}{{- '[' + call.function.name + ' ' }}"
    "{{- call.function.arguments | tojson }}{{- ']' }}{%- endfor %}{{- '<|im_end|>' }}{%- endgeneration %}",
).replace("{%- for message in messages %}", "{{- tools | tojson }}{%- for message in messages %}", 1)
ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length != 1 %}"
    "{{ raise_exception('Only one tool call is supported') }}{% endif %}{{ m.role + m.content }}"
    "{{ m.tool_calls[0].function.name if m.tool_calls else '' }}{% endfor %}{{ tools | tojson }}"
)
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]
USER = {"role": "user", "content": "a"}


def call(number: int, **arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps(arguments)}
    return {"id": f"call_{number}", "type": "function", "function": function}


CHAT: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "b", "tool_calls": [call(1, city="c"), call(2, city="é")]},
    {"role": "tool", "tool_call_id": "call_1", "content": "d"},
    {"role": "tool", "tool_call_id": "call_2", "content": "e"},
    {"role": "assistant", "content": "f"},
]


def parsed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as transformers expects them: with arguments as objects."""
    found = json.loads(json.dumps(messages))
    for each in (one for message in found for one in message.get("tool_calls", ())):
        each["function"]["arguments"] = json.loads(each["function"]["arguments"])
    return found


@pytest.mark.parametrize("template", [HERMES, MARKED_CALLS], ids=["prefixes", "marks"])
def test_tokens_equal_those_of_transformers(make_base: Any, template: str) -> None:
    base: Base = make_base(template)

    ((ids, _),) = base.rows({"messages": CHAT, "tools": TOOLS})

    assert ids == base.reference().apply_chat_template(parsed(CHAT), tools=TOOLS, return_dict=False)


def test_tool_calls_are_trained_on_like_text(make_base: Any) -> None:
    base: Base = make_base(HERMES)
    row = {"messages": CHAT, "tools": TOOLS}

    assert base.trained_text(row) == (
        'b\n<tool_call>\n{"name": "weather", "arguments": {"city": "c"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "é"}}\n</tool_call><|im_end|>|f<|im_end|>'
    )
    assert base.trained_text(row, loss="last_turn") == "f<|im_end|>"


def test_preference_pair_compares_tool_calls(make_base: Any) -> None:
    base: Base = make_base(HERMES)
    chosen, rejected = ({"role": "assistant", "tool_calls": [call(1, city=city)]} for city in "bc")
    outputs = {"preferred_output": [chosen], "non_preferred_output": [rejected]}

    _, out = base.prepare({"input": {"messages": [USER], "tools": TOOLS}, **outputs})

    tokens = TokenDataset.load(out)
    assert tokens.num_rows == 2
    for index, answer in enumerate((chosen, rejected)):
        ids, mask = tokens.row(index)
        messages = parsed([USER, {**answer, "content": ""}])
        assert ids.tolist() == base.reference().apply_chat_template(messages, tools=TOOLS, return_dict=False)
        assert "<tool_call>" in str(base.reference().decode(ids[mask.astype(bool)].tolist()))


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "b"}], "tools": TOOLS}, "does not render tools"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [call(1)]}]}, "does not render tool calls"),
    ],
)
@pytest.mark.parametrize("template", [SMOLLM2, MARKED], ids=["prefixes", "marks"])
def test_base_model_whose_template_ignores_tools_is_rejected(
    make_base: Any, template: str, row: dict[str, Any], part: str
) -> None:
    base: Base = make_base(template)

    refusal: Any = base.prepare(row)[0].get("refusal")

    assert refusal["code"] == "template_without_tools"
    assert part in refusal["message"]
    assert "Qwen2.5" in refusal["remedy"]
    assert "lorry models add NAME SOURCE --chat-template chatml|" in refusal["remedy"]


def test_restriction_of_a_template_is_reported_with_its_own_reason(make_base: Any) -> None:
    base: Base = make_base(ONE_CALL)

    refusal: Any = base.prepare({"messages": CHAT, "tools": TOOLS})[0].get("refusal")

    assert refusal["code"] == "unusable_chat_template"
    assert "Only one tool call is supported" in refusal["message"]


@pytest.mark.parametrize(
    ("template", "has_template", "may_render"),
    [(HERMES, True, True), (MARKED_CALLS, True, True), (SMOLLM2, True, False), (None, False, False)],
)
def test_import_finds_out_whether_there_is_a_template_and_whether_it_reads_tools(
    make_base: Callable[[str | None], Base], template: str | None, has_template: bool, may_render: bool
) -> None:
    found = describe_templates(make_base(template).folder)

    assert found == {"has_chat_template": has_template, "renders_tools": may_render}


def test_template_for_tools_counts_before_the_default_one(make_base: Callable[[str | None], Base]) -> None:
    base = make_base(SMOLLM2)
    (base.folder / TOOL_USE).parent.mkdir()
    (base.folder / TOOL_USE).write_text(HERMES)

    assert describe_templates(base.folder)["renders_tools"]

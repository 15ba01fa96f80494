"""Validates a row that is a conversation, with a reason and a remedy for each error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from catalog.datasets.messages import CHAT_FORM, ChatMessage, check_messages, is_answer
from catalog.datasets.row_json import BadRow, kind_of, quoted
from catalog.datasets.tools import check_functions, check_tools

TOOL_KEYS = ("tools", "functions", "parallel_tool_calls")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, with the tools that the model may call in it."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    """In OpenAI's format. None without tools."""


def check_chat(row: dict[str, Any]) -> Chat:
    """Return the conversation of one row. Raises BadRow."""
    for key in row:
        if key != "messages" and key not in TOOL_KEYS:
            raise BadRow("unknown_chat_key", key=quoted(key), tool_keys=", ".join(("messages", *TOOL_KEYS)))
    if "messages" not in row:
        raise BadRow("messages_missing")
    tools = checked_tools("", row)
    chat = Chat(check_messages("messages", row["messages"], form=f"a list of messages, such as {CHAT_FORM}"), tools)
    if not any(is_answer(message) for message in chat.messages):
        raise BadRow("chat_without_answer")
    return chat


def checked_tools(prefix: str, fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools in `fields`, of which the errors speak as `prefix` and the key. Raises BadRow.

    `parallel_tool_calls` is accepted and ignored: no chat template renders it.
    """
    parallel = fields.get("parallel_tool_calls")
    if not isinstance(parallel, bool | None):
        raise BadRow("invalid_parallel_tool_calls", prefix=prefix, kind=kind_of(parallel))
    tools, functions = fields.get("tools"), fields.get("functions")
    if tools is not None and functions is not None:
        raise BadRow("tools_and_functions", prefix=prefix)
    if functions is not None:
        return check_functions(f"{prefix}functions", functions) or None
    return None if tools is None else check_tools(f"{prefix}tools", tools) or None


def is_supervised(chat: Chat) -> bool:
    """Return whether the conversation has tokens to train on."""
    return any(is_answer(message) and message.get("weight", 1) for message in chat.messages)


def only_last_trained(chat: Chat) -> Chat:
    """Return the conversation with weight 0 on every assistant message except the last one."""
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    earlier = set(answers[:-1])
    return replace(
        chat,
        messages=[
            ChatMessage({**message, "weight": 0}) if index in earlier else message
            for index, message in enumerate(chat.messages)
        ],
    )

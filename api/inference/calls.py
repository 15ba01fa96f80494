"""Turns the body of a completion request into the parameters for a worker, and the format of the answer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from api.inference.responses import ChatFormat, TextFormat, head_of
from api.schemas.inference import ChatCompletionRequest, CompletionRequest, SamplingRequest
from catalog.datasets.messages import check_messages
from catalog.datasets.row_json import BadRow, check_characters
from catalog.datasets.tools import check_tools
from catalog.errors import InvalidRequest
from catalog.inference.requests import Model
from catalog.tables.table import Json

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""
MAX_TEXT_CHOICES = 64
"""Maximum number of answers to all prompts of a request together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionCall:
    """A valid request for completions."""

    parameters: Json
    """The request for a worker, with all defaults."""
    num_choices: int
    form: Callable[[Model], ChatFormat | TextFormat]
    """Returns the format of a new answer of this model."""


def prompt_parameter(parameters: Json) -> str:
    """Return the parameter of the request in which the client sent the prompt."""
    return "messages" if "messages" in parameters else "prompt"


def chat_call(body: ChatCompletionRequest) -> CompletionCall:
    """Raises InvalidRequest."""
    offers_tools = bool(body.tools) and body.tool_choice != "none"
    prompt: dict[str, Any] = {"messages": _messages(body)}
    if offers_tools:
        prompt["tools"] = _tools(body)
    names = frozenset(tool["function"]["name"] for tool in prompt.get("tools", ()))
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs_without_logprobs", param="top_logprobs")
    limit = body.max_completion_tokens or body.max_tokens

    def form(model: Model) -> ChatFormat:
        head = head_of("chatcmpl", model=model.name, base_digest=model.base_digest)
        max_calls = 1 if body.parallel_tool_calls is False else None
        return ChatFormat(head, tools=names, with_logprobs=bool(body.logprobs), max_calls=max_calls)

    parameters = _parameters(body, prompt, max_tokens=limit, num_logprobs=num_logprobs)
    return CompletionCall(parameters=parameters, num_choices=body.n or 1, form=form)


def text_call(body: CompletionRequest) -> CompletionCall:
    """Raises InvalidRequest."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    _check_characters(prompts, "prompt")
    num_choices = (body.n or 1) * len(prompts)
    if num_choices > MAX_TEXT_CHOICES:
        raise InvalidRequest(
            "too_many_answers",
            num_choices=num_choices,
            n=body.n or 1,
            num_prompts=len(prompts),
            max_text_choices=MAX_TEXT_CHOICES,
            param="n",
        )
    limit = body.max_tokens or DEFAULT_COMPLETION_TOKENS

    def form(model: Model) -> TextFormat:
        head = head_of("cmpl", model=model.name, base_digest=model.base_digest)
        return TextFormat(head, with_logprobs=body.logprobs is not None)

    parameters = _parameters(body, {"prompts": prompts}, max_tokens=limit, num_logprobs=body.logprobs)
    return CompletionCall(parameters=parameters, num_choices=num_choices, form=form)


def _messages(body: ChatCompletionRequest) -> list[Any]:
    _check_characters(body.messages, "messages")
    try:
        return list(check_messages("messages", json.loads(json.dumps(body.messages)), form="a list of messages"))
    except BadRow as error:
        raise _bad_field(error, "messages") from error


def _tools(body: ChatCompletionRequest) -> list[dict[str, Any]]:
    _check_characters(body.tools, "tools")
    try:
        return check_tools("tools", body.tools)
    except BadRow as error:
        raise _bad_field(error, "tools") from error


def _check_characters(value: Any, param: str) -> None:
    try:
        check_characters(value)
    except BadRow as error:
        raise InvalidRequest(replace(error.text, message=f"In '{param}', {error.text.message}"), param=param) from error


def _bad_field(error: BadRow, param: str) -> InvalidRequest:
    message = error.text.message
    return InvalidRequest(replace(error.text, message=message[:1].upper() + message[1:]), param=param)


def _parameters(
    body: SamplingRequest, prompt: dict[str, Any], *, max_tokens: int | None, num_logprobs: int | None
) -> dict[str, Any]:
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    return {
        **prompt,
        "model": body.model,
        "max_tokens": max_tokens,
        "n": body.n or 1,
        "stop": stops,
        "seed": secrets.randbelow(2**62) if body.seed is None else body.seed,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "num_logprobs": num_logprobs,
    }

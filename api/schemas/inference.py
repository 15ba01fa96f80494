"""Schemas of completions, in OpenAI's format."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.schemas import ObjectId
from catalog.datasets.messages import ROLES
from catalog.spec.model_fields import WITHOUT_NUL, Strict

MAX_CHOICES = 16
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_PROMPTS = 16
IGNORED = "Accepted for compatibility and ignored."

ModelName = Annotated[
    str, Field(min_length=1, max_length=512, description="Name of a model.", json_schema_extra=WITHOUT_NUL)
]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Message = Annotated[
    dict[str, Any], Field(json_schema_extra={"required": ["role"], "properties": {"role": {"enum": list(ROLES)}}})
]
Text = Annotated[str, Field(json_schema_extra=WITHOUT_NUL)]


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(
        default=None, description="Send the number of tokens in a last chunk. Default: false."
    )
    include_obfuscation: Literal[False] | None = Field(default=None, description=IGNORED)


class TextFormat(Strict):
    """The format of an answer."""

    type: Literal["text"] = Field(description="Only plain text is supported.")


class SamplingRequest(Strict):
    """The parameters that both endpoints have."""

    unsupported: ClassVar[frozenset[str]]
    """Parameters of OpenAI's endpoint that Lorry does not have. Null is their default, so it is accepted."""
    model: ModelName
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Default: 1. 0 selects the most likely token."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Probability of the tokens that are sampled from. Default: 1."
    )
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Number of answers. Default: 1.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        default=None, description="Texts that end an answer and are not part of it. Default: none."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed gives the same answer on the same kind of machine. Default: random.",
    )
    presence_penalty: Penalty | None = Field(
        default=None, description="Subtracted from the logits of used tokens. Default: 0."
    )
    frequency_penalty: Penalty | None = Field(
        default=None, description="Subtracted from the logits of used tokens, once for each use. Default: 0."
    )
    stream: bool | None = Field(
        default=None, description="Send the answer as server-sent events while it grows. Default: false."
    )
    stream_options: StreamOptions | None = Field(
        default=None, description="Options of a streamed answer. Null: the defaults."
    )
    user: str | None = Field(default=None, description=IGNORED)

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cast(dict[str, Any], given)
        return {name: item for name, item in fields.items() if item is not None or name not in cls.unsupported}


class ChatCompletionRequest(SamplingRequest):
    """A conversation to which the model answers."""

    verbatim = frozenset({"messages", "tools"})
    unsupported = frozenset(
        {
            "audio",
            "function_call",
            "functions",
            "logit_bias",
            "modalities",
            "moderation",
            "prediction",
            "prompt_cache_options",
            "prompt_cache_retention",
            "reasoning_effort",
            "verbosity",
            "web_search_options",
        }
    )
    messages: list[Message] = Field(
        min_length=1, max_length=2048, description="The conversation, in the format of chat rows."
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="Maximum tokens to generate. Default: the model's maximum length."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Older name of max_completion_tokens, used if that is omitted."
    )
    logprobs: bool | None = Field(default=None, description="Return the log-probability of each token. Default: false.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Number of most likely tokens to return for each token. Default: none."
    )
    tools: list[dict[str, Any]] | None = Field(
        default=None, description="Functions that the model may call. Default: none."
    )
    tool_choice: Literal["auto", "none"] | None = Field(
        default=None, description="none: the tools are not offered. Default: auto."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="false: an answer has only its first call. Default: the model decides."
    )
    response_format: TextFormat | None = Field(default=None, description="Format of the answer. Default: text.")
    metadata: dict[str, str] | None = Field(default=None, description=IGNORED)
    store: Literal[False] | None = Field(default=None, description="Answers are not stored. Default: false.")
    service_tier: Literal["auto", "default"] | None = Field(default=None, description=IGNORED)
    safety_identifier: str | None = Field(default=None, description=IGNORED)
    prompt_cache_key: str | None = Field(default=None, description=IGNORED)


class CompletionRequest(SamplingRequest):
    """A text, or several, that the model continues."""

    unsupported = frozenset({"logit_bias", "suffix"})
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(
        description="The text, or up to 16 texts, each with its own answers."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Maximum number of tokens. Default: 16.")
    logprobs: int | None = Field(
        default=None, ge=0, le=5, description="Number of most likely tokens to return for each token. Default: none."
    )
    echo: Literal[False] | None = Field(default=None, description="The prompt is not returned. Default: false.")
    best_of: Literal[1] | None = Field(default=None, description="Only 1 is supported. Default: 1.")


class Usage(BaseModel):
    """Tokens of a request and its answers."""

    prompt_tokens: int = Field(description="Number of tokens in the prompts.")
    completion_tokens: int = Field(description="Number of tokens in the answers.")
    total_tokens: int = Field(description="Number of tokens in prompts and answers.")


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str = Field(description="Text of the token.")
    logprob: float = Field(description="Natural logarithm of the token's probability.")
    bytes: list[int] | None = Field(description="UTF-8 bytes of the text; null if the token is a part of a character.")


class ChatTokenLogprob(TokenLogprob):
    """A token of the answer, with the most likely alternatives."""

    top_logprobs: list[TokenLogprob] = Field(description="The most likely tokens at this position.")


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[ChatTokenLogprob] | None = Field(description="The tokens of the answer, in order.")
    refusal: None = Field(default=None, description="Always null, for compatibility.")


class FunctionCallObject(BaseModel):
    """A call of a function."""

    name: str = Field(description="Function that the model calls.")
    arguments: str = Field(description="Arguments of the call as JSON text. The model wrote it, so it may be invalid.")


class ToolCallObject(BaseModel):
    """A call of a tool."""

    id: str = Field(description="ID of the call, to which a message with the tool's result refers.")
    type: Literal["function"] = Field(default="function", description="Kind of tool.")
    function: FunctionCallObject = Field(description="The function and its arguments.")


class AssistantMessage(BaseModel):
    """The message that the model answers."""

    role: Literal["assistant"] = Field(default="assistant", description="Author of the message.")
    content: str | None = Field(description="Text of the answer; null if it only calls tools.")
    refusal: None = Field(default=None, description="Always null, for compatibility.")
    tool_calls: list[ToolCallObject] | None = Field(
        default=None, description="Calls of the request's functions; null if there are none."
    )


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int = Field(description="Number of the answer, from 0.")
    message: AssistantMessage = Field(description="The model's answer.")
    logprobs: ChatLogprobs | None = Field(description="Log-probabilities of the tokens; null unless requested.")
    finish_reason: FinishReason = Field(
        description="`stop`: the answer is complete. `length`: it reached the maximum of tokens. `tool_calls`: "
        "it calls "
        "tools."
    )


USAGE: dict[str, int] = {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21}
CHAT_EXAMPLE: dict[str, Any] = {
    "id": "chatcmpl-3f2b8c9d0a1e4f5a6b7c8d9e",
    "object": "chat.completion",
    "created": 1790000000,
    "model": "ft:smollm2:default:support:8d9e0f1a",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Enter your order number on the tracking page.",
                "refusal": None,
                "tool_calls": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
    "system_fingerprint": "fp_8e9079689980",
}
TEXT_EXAMPLE: dict[str, Any] = {
    "id": "cmpl-3f2b8c9d0a1e4f5a6b7c8d9e",
    "object": "text_completion",
    "created": 1790000000,
    "model": "smollm2",
    "choices": [{"index": 0, "text": " a small town in the hills.", "logprobs": None, "finish_reason": "length"}],
    "usage": USAGE,
    "system_fingerprint": "fp_8e9079689980",
}


class ChatCompletion(BaseModel):
    """An answer to a conversation. With `stream`, the response consists of chat.completion.chunk objects instead."""

    model_config = ConfigDict(json_schema_extra={"example": CHAT_EXAMPLE})
    id: ObjectId
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Time of the answer, in Unix seconds.")
    model: str = Field(description="Name of the model that answered.")
    choices: list[ChatChoice] = Field(description="The answers, as many as `n`.")
    usage: Usage
    system_fingerprint: str = Field(description="Identifies the base model's files: equal values mean equal bytes.")


class TextLogprobs(BaseModel):
    """Log-probabilities of a continuation."""

    tokens: list[str] = Field(description="Text of each token.")
    token_logprobs: list[float] = Field(description="Natural logarithm of each token's probability.")
    top_logprobs: list[dict[str, float]] = Field(
        description="For each token, log-probabilities of the most likely tokens and of the chosen one, by text."
    )
    text_offset: list[int] = Field(description="Position of each token in the continuation, in characters.")


class TextChoice(BaseModel):
    """One of the continuations."""

    index: int = Field(description="Number of the continuation, from 0.")
    text: str = Field(description="The continuation, without the prompt.")
    logprobs: TextLogprobs | None = Field(description="Log-probabilities of the tokens; null unless requested.")
    finish_reason: Literal["stop", "length"] = Field(
        description="`stop`: the text is complete. `length`: it reached the maximum of tokens."
    )


class Completion(BaseModel):
    """Continuations of texts. With `stream`, the response consists of parts of this object instead."""

    model_config = ConfigDict(json_schema_extra={"example": TEXT_EXAMPLE})
    id: ObjectId
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Time of the answer, in Unix seconds.")
    model: str = Field(description="Name of the model that answered.")
    choices: list[TextChoice] = Field(description="The continuations, as many as `n` for each prompt.")
    usage: Usage
    system_fingerprint: str = Field(description="Identifies the base model's files: equal values mean equal bytes.")

"""Schemas of completions, in OpenAI's format."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from catalog.datasets.messages import ROLES
from catalog.spec.strict import WITHOUT_NUL, Strict

MAX_CHOICES = 16
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_PROMPTS = 16

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
    include_usage: bool | None = Field(
        default=None, description="Send the number of tokens in a last chunk. Default: false."
    )
    include_obfuscation: Literal[False] | None = Field(default=None, description="Ignored.")


class TextFormat(Strict):
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
        default=None, description="Texts that end an answer. They are not part of it."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed gives the same answer on the same kind of machine.",
    )
    presence_penalty: Penalty | None = Field(default=None, description="Subtracted from the logits of used tokens.")
    frequency_penalty: Penalty | None = Field(
        default=None, description="Subtracted from the logits of used tokens, once for each use."
    )
    stream: bool | None = Field(default=None, description="Send the answer as server-sent events while it grows.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Ignored.")

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
    max_tokens: int | None = Field(default=None, ge=1, description="Older name of max_completion_tokens.")
    logprobs: bool | None = Field(default=None, description="Return the log-probability of each token.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Number of most likely tokens to return for each token."
    )
    tools: list[dict[str, Any]] | None = Field(default=None, description="Functions that the model may call.")
    tool_choice: Literal["auto", "none"] | None = Field(default=None, description="none: the tools are not offered.")
    parallel_tool_calls: bool | None = Field(
        default=None, description="false: an answer has only its first call. Default: the model decides."
    )
    response_format: TextFormat | None = None
    metadata: dict[str, str] | None = Field(default=None, description="Ignored.")
    store: Literal[False] | None = Field(default=None, description="Answers are not stored.")
    service_tier: Literal["auto", "default"] | None = Field(default=None, description="Ignored.")
    safety_identifier: str | None = Field(default=None, description="Ignored.")
    prompt_cache_key: str | None = Field(default=None, description="Ignored.")


class CompletionRequest(SamplingRequest):
    """A text, or several, that the model continues."""

    unsupported = frozenset({"logit_bias", "suffix"})
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(
        description="The text, or up to 16 texts, each with its own answers."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Maximum number of tokens. Default: 16.")
    logprobs: int | None = Field(
        default=None, ge=0, le=5, description="Number of most likely tokens to return for each token."
    )
    echo: Literal[False] | None = Field(default=None, description="The prompt is not returned.")
    best_of: Literal[1] | None = Field(default=None, description="Only 1 is supported.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob] | None
    refusal: None = None


class FunctionCallObject(BaseModel):
    name: str
    arguments: str


class ToolCallObject(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCallObject


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallObject] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


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
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Continuations of texts. With `stream`, the response consists of parts of this object instead."""

    model_config = ConfigDict(json_schema_extra={"example": TEXT_EXAMPLE})
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str

"""Requests are validated before a worker gets them."""

from __future__ import annotations

import pytest

from api.inference.calls import chat_call, text_call
from api.schemas.inference import ChatCompletionRequest, CompletionRequest
from catalog.errors import InvalidRequest


def test_number_of_answers_to_all_prompts_is_limited() -> None:
    assert text_call(CompletionRequest(model="smol", prompt=["a"] * 16, n=4)).num_choices == 64

    with pytest.raises(InvalidRequest, match="80 answers: n is 5, and there are 16 prompts") as raised:
        text_call(CompletionRequest(model="smol", prompt=["a"] * 16, n=5))

    assert (raised.value.code, raised.value.param) == ("too_many_answers", "n")


def test_null_is_the_default_of_each_sampling_parameter() -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "stream")
    question = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}

    without = chat_call(ChatCompletionRequest.model_validate(question))
    given = chat_call(ChatCompletionRequest.model_validate({**question, **dict.fromkeys(names)}))

    assert {**given.parameters, "seed": 0} == {**without.parameters, "seed": 0}
    assert [given.parameters[name] for name in ("temperature", "top_p", "n")] == [1.0, 1.0, 1]
    assert given.num_choices == 1

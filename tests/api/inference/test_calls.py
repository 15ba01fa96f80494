"""Requests are validated before a worker gets them."""

from __future__ import annotations

import pytest

from api.inference.calls import text_call
from api.schemas.inference import CompletionRequest
from catalog.errors import InvalidRequest


def test_number_of_answers_to_all_prompts_is_limited() -> None:
    assert text_call(CompletionRequest(model="smol", prompt=["a"] * 16, n=4)).num_choices == 64

    with pytest.raises(InvalidRequest, match="80 answers: n is 5, and there are 16 prompts") as raised:
        text_call(CompletionRequest(model="smol", prompt=["a"] * 16, n=5))

    assert (raised.value.code, raised.value.param) == ("too_many_answers", "n")

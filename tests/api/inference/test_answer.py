"""The errors of an answer, and its maximum size."""

from __future__ import annotations

import pytest

from api.inference.answer import AnswerInterrupted, PartialAnswer, failure
from catalog.errors import InvalidRequest, LorryError
from catalog.inference.requests import AnswerFailed


@pytest.mark.parametrize(
    ("code", "kind", "param"),
    [
        ("context_length_exceeded", InvalidRequest, "prompt"),
        ("template_without_tools", InvalidRequest, "tools"),
        ("out_of_memory", AnswerInterrupted, None),
        ("disk_error", AnswerInterrupted, None),
        ("inference_failed", AnswerFailed, None),
    ],
)
def test_error_of_a_worker_becomes_one_of_the_api(code: str, kind: type[LorryError], param: str | None) -> None:
    error = failure({"code": code, "message": "It is wrong.", "remedy": "Do better."}, prompt="prompt")

    assert type(error) is kind
    assert (error.code, error.param, error.sentence()) == (code, param, "It is wrong. Do better.")


def test_text_that_is_kept_until_the_answer_is_complete_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inference.answer.MAX_KEPT_BYTES", 10)
    answer = PartialAnswer()
    answer.keep(5)
    answer.keep(5)

    with pytest.raises(InvalidRequest) as raised:
        answer.keep(1)

    assert (raised.value.code, raised.value.param) == ("answer_too_large", "max_tokens")

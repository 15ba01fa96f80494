"""Requests go to a serving endpoint that has the model ready, and otherwise to the built-in engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from api.deps import Services
from api.serving.keeper import EndpointKeepers
from catalog.tables.tenancy import Project
from tests.api.serving_engines import PROMPT_TOKENS, SERVED, ReferenceTrainer, tokens_of
from tests.api.serving_site import QUESTION, ServingSite
from tests.api.site import until

TEXT = {"prompt": "Hi"}


@pytest.fixture
def ready(place: ServingSite, trainer: ReferenceTrainer) -> ServingSite:
    place.deployed()
    trainer.answered.clear()
    return place


def text_of(model: str, number: int = 4) -> str:
    return "".join(token["token"] for token in tokens_of(model, number))


def client_of(place: ServingSite) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{place.site.url}/v1", api_key=place.site.key, max_retries=0)


def usage(place: ServingSite) -> dict[str, int]:
    """Return the sum of all days, since a test may run across midnight."""
    days = place.client.get("/v1/usage").json()["data"]
    counted = [used["completions"] for day in days for used in day["results"]]
    return {name: sum(each[name] for each in counted) for name in ("requests", "prompt_tokens", "completion_tokens")}


COUNTED = {"requests": 1, "prompt_tokens": PROMPT_TOKENS, "completion_tokens": 4}


def test_adapter_is_answered_by_its_endpoint_in_the_form_of_the_built_in_engine(
    ready: ServingSite, trainer: ReferenceTrainer, services: Services
) -> None:
    found = ready.ask(logprobs=True, top_logprobs=2).json()

    assert trainer.answered == []
    (sent,) = ready.vllm.completions()
    assert sent["model"] == ready.adapter.name
    assert (sent["top_k"], sent["repetition_penalty"], sent["min_p"]) == (-1, 1.0, 0.0)
    assert found["model"] == ready.adapter.name
    assert found["choices"][0]["message"]["content"] == text_of(ready.adapter.name)
    assert found["choices"][0]["finish_reason"] == "length"
    assert len(found["choices"][0]["logprobs"]["content"]) == 4
    assert found["usage"] == {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 4, "total_tokens": 16}
    until(lambda: usage(ready) == COUNTED)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "end_ids"), [("/v1/chat/completions", [2, 5]), ("/v1/completions", [2])])
def test_answer_ends_at_the_end_tokens_of_the_built_in_engine(
    ready: ServingSite, path: str, end_ids: list[int], stream: bool
) -> None:
    ready.vllm.end_id = end_ids[-1]

    with client_of(ready) as client:
        if "chat" in path:
            asked: Any = {"messages": QUESTION["messages"], "logprobs": True}
            create: Any = client.chat.completions.create
        else:
            asked, create = {"prompt": "Hi", "logprobs": 1}, client.completions.create
        found = create(model=ready.adapter.name, max_tokens=4, stream=stream, **asked)
        choices = [part.choices[0] for part in found if part.choices] if stream else found.choices

    (sent,) = ready.vllm.completions()
    assert (sent["stop_token_ids"], sent["ignore_eos"]) == (end_ids, True)
    assert choices[-1].finish_reason == "stop"
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [entry.token for one in logprobs for entry in one.content] if "chat" in path else None
    tokens = tokens or [token for one in logprobs for token in one.tokens]
    assert "".join(tokens) == text_of(ready.adapter.name), "the end token is no part of the answer"
    until(lambda: usage(ready) == {**COUNTED, "completion_tokens": 5})


def test_prompt_of_an_endpoint_has_the_date_of_the_built_in_engine(ready: ServingSite) -> None:
    ready.ask()

    (chat,) = ready.vllm.completions()
    probes = [body for path, body in ready.vllm.requests if path.endswith("completions") and not body.get("stream")]
    assert [body["chat_template_kwargs"] for body in (chat, *probes)] == [{"date_string": "26 Jul 2024"}] * 3


def test_projects_share_no_cached_prefixes(ready: ServingSite, services: Services) -> None:
    ready.ask()
    ready.ask()

    first, second = (body["cache_salt"] for body in ready.vllm.completions())
    assert first == second
    assert first == services.pepper.digest(f"prefixes of {ready.adapter.project_id}")
    probes = [body for path, body in ready.vllm.requests if path.endswith("completions") and not body.get("stream")]
    assert not any("cache_salt" in body for body in probes)


def test_base_model_is_answered_under_the_servers_name_for_it(ready: ServingSite, trainer: ReferenceTrainer) -> None:
    found = ready.ask(ready.adapter.base_model).json()

    assert trainer.answered == []
    assert ready.vllm.completions()[0]["model"] == SERVED
    assert (found["model"], found["choices"][0]["message"]["content"]) == (ready.adapter.base_model, text_of("base"))


def test_streamed_answers_of_both_routes_are_complete(ready: ServingSite, trainer: ReferenceTrainer) -> None:
    with client_of(ready) as client:
        chat = list(
            client.chat.completions.create(
                model=ready.adapter.name,
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        texts = list(
            client.completions.create(model=ready.adapter.name, prompt="Hi", max_tokens=4, logprobs=2, stream=True)
        )

    assert trainer.answered == []
    assert "".join(part.choices[0].delta.content or "" for part in chat if part.choices) == text_of(ready.adapter.name)
    assert chat[-1].usage is not None
    assert chat[-1].usage.total_tokens == PROMPT_TOKENS + 4
    assert "".join(part.choices[0].text for part in texts) == text_of(ready.adapter.name)
    assert ready.vllm.completions()[-1]["prompt"] == ["Hi"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "prompt"), [("/v1/chat/completions", {}), ("/v1/completions", TEXT)])
def test_a_header_names_the_engine_that_answered(
    ready: ServingSite, trainer: ReferenceTrainer, path: str, prompt: dict[str, Any], stream: bool
) -> None:
    given = {**({"messages": None} if prompt else {}), **prompt}
    body = {name: value for name, value in {**QUESTION, **given, "stream": stream}.items() if value is not None}
    body["model"] = ready.adapter.name

    routed = ready.client.post(path, json=body)
    ready.vllm.fails_with = 400
    own = ready.client.post(path, json=body)

    assert (routed.headers["x-lorry-engine"], own.headers["x-lorry-engine"]) == ("vllm-1", "built-in")
    assert [answer.status_code for answer in (routed, own)] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_the_rate_limit_headers(ready: ServingSite, trainer: ReferenceTrainer, stream: bool) -> None:
    limits = {"requests_per_minute": 600}
    path = f"/v1/api_keys/{ready.site.key.split('_')[1]}/limits"
    assert ready.operator.post(path, json=limits).status_code == 200

    answer = ready.ask(stream=stream)

    assert (answer.status_code, answer.headers["x-ratelimit-limit-requests"]) == (200, "600")
    assert {"x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"} <= set(answer.headers)


def test_an_error_names_no_engine(ready: ServingSite) -> None:
    assert "x-lorry-engine" not in ready.ask("ft:unknown", stream=True).headers


def test_requests_with_tools_are_answered_by_the_built_in_engine(ready: ServingSite, trainer: ReferenceTrainer) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

    assert ready.ask(tools=[tool]).status_code == 200

    assert trainer.answered == [ready.adapter.name]
    assert ready.vllm.completions() == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", [{"fails_with": 400}, {"fails_with": 503}, {"breaks_after": 0}])
def test_failure_before_the_first_token_is_answered_by_the_built_in_engine(
    ready: ServingSite, trainer: ReferenceTrainer, change: dict[str, Any], stream: bool
) -> None:
    for name, value in change.items():
        setattr(ready.vllm, name, value)

    response = ready.ask(stream=stream)

    assert response.status_code == 200
    assert trainer.answered == [ready.adapter.name]
    assert '"error"' not in response.text
    until(lambda: usage(ready) == COUNTED)


@pytest.mark.parametrize("finish", ["abort", "repetition"])
def test_answer_that_the_server_cuts_off_is_no_complete_answer(
    ready: ServingSite, trainer: ReferenceTrainer, finish: str
) -> None:
    ready.vllm.finish = finish

    whole, streamed = ready.ask(), ready.ask(stream=True)

    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "answer_interrupted")
    assert '"code":"answer_interrupted"' in streamed.text.replace(": ", ":")
    assert "[DONE]" not in streamed.text
    assert trainer.answered == []


def test_chat_without_a_chat_template_is_not_sent_to_an_endpoint(place: ServingSite, trainer: ReferenceTrainer) -> None:
    trainer.has_template = False
    place.deployed()

    refused = place.ask()
    answered = place.client.post("/v1/completions", json={"model": place.adapter.name, **TEXT})

    assert refused.json()["error"]["code"] == "base_has_no_chat_template"
    assert answered.headers["x-lorry-engine"] == "vllm-1"
    assert [body["prompt"] for body in place.vllm.completions()] == [["Hi"]]


def test_server_that_has_lost_the_adapter_gets_it_again_while_the_built_in_engine_answers(
    ready: ServingSite, trainer: ReferenceTrainer
) -> None:
    ready.vllm.adapters.clear()

    assert ready.ask().status_code == 200

    ready.wait_for("ready")
    ready.vllm.requests.clear()
    ready.ask()
    assert len(ready.vllm.completions()) == 1


def test_keeper_learns_at_once_that_an_endpoint_failed(
    ready: ServingSite, trainer: ReferenceTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[bool] = []
    monkeypatch.setattr(EndpointKeepers, "on_wake", lambda _: woken.append(True))
    ready.vllm.fails_with = 503

    assert ready.ask().status_code == 200

    until(lambda: woken)


def test_failure_after_the_first_token_ends_the_stream_with_an_error(
    ready: ServingSite, trainer: ReferenceTrainer
) -> None:
    ready.vllm.breaks_after = 2

    whole, streamed = ready.ask(), ready.ask(stream=True)

    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "answer_interrupted")
    *_, last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert last["error"]["code"] == "answer_interrupted"
    assert last["error"]["message"] == "The engine did not complete the answer. Send the request again."
    assert trainer.answered == []


def test_used_up_quota_of_tokens_also_applies_to_an_endpoint(ready: ServingSite, services: Services) -> None:
    with services.db.write() as session:
        session.get_one(Project, ready.adapter.project_id).max_tokens_per_day = 1
    assert ready.ask().status_code == 200
    until(lambda: usage(ready) == COUNTED)

    refused = ready.ask()

    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    assert len(ready.vllm.completions()) == 1


def test_parameters_are_validated_before_a_request_is_sent(ready: ServingSite) -> None:
    assert ready.ask(temperature=3).status_code == 400
    assert ready.ask("ft:unknown").status_code == 404

    assert ready.vllm.completions() == []


def test_other_project_can_not_use_a_deployed_adapter(ready: ServingSite) -> None:
    body = {"model": ready.adapter.name, "messages": [{"role": "user", "content": "Hi"}]}

    refused = ready.stranger.post("/v1/chat/completions", json=body)

    assert refused.json()["error"]["code"] == "adapter_not_found"
    assert ready.vllm.completions() == []

"""End to end without fakes: the real openai client calls base models and adapters that a worker's trainer answers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.system.api_process import Service, api_process
from tests.worker_site import BASE, PEPPER, WorkerSite, worker_site

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What color is the lorry?"}]
OPTIONS: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
REFERENCE = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, question = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
if adapter:
    model = PeftModel.from_pretrained(model, adapter)
ids = tokenizer.apply_chat_template(
    json.loads(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
)
end = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
whole = model.generate(**ids, do_sample=False, max_new_tokens=12, eos_token_id=end, pad_token_id=0)
print(json.dumps(tokenizer.decode(whole[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


class Deployment:
    """A service with one worker and one trained adapter."""

    def __init__(self, site: WorkerSite, service: Service) -> None:
        self.site = site
        self.service = service
        rows = site.upload(40)
        self.job = site.submit(rows, max_steps=6, lora={"rank": 4}, optimizer={"learning_rate": 0.02})
        site.start_worker()
        site.wait_for_end(self.job)
        self.model = site.adapter(self.job).name

    def reference(self, folder: Path, *, with_adapter: bool) -> str:
        """Return the answer of transformers, with PEFT for the adapter."""
        adapter = ""
        if with_adapter:
            store = self.site.store
            store.fetch(store.get_manifest(self.site.adapter(self.job).artifact), folder / "adapter")
            adapter = str(folder / "adapter")
        base = next(path for path in self.site.settings.bases_dir().iterdir() if (path / "config.json").exists())
        command = [sys.executable, "-W", "ignore", "-c", REFERENCE, str(base), adapter, json.dumps(QUESTION)]
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("site")
    with (
        worker_site(folder, LORRY_IDLE_SECONDS="60") as site,
        api_process(site.settings.data_dir, pepper=PEPPER) as service,
    ):
        yield Deployment(site, service)


@pytest.fixture
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with deployment.service.client() as client:
        yield client


@pytest.mark.parametrize("with_adapter", [False, True])
def test_answers_are_those_of_transformers_and_peft(
    deployment: Deployment, client: openai.OpenAI, tmp_path: Path, with_adapter: bool
) -> None:
    model = deployment.model if with_adapter else BASE

    completion = client.chat.completions.create(model=model, **OPTIONS)

    (choice,) = completion.choices
    assert choice.message.content == deployment.reference(tmp_path, with_adapter=with_adapter)
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert completion.model == model
    assert completion.usage is not None
    assert 0 < completion.usage.completion_tokens <= 12
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_streamed_answer_is_the_same_in_pieces(deployment: Deployment, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=deployment.model, **OPTIONS)

    with client.chat.completions.create(
        model=deployment.model, stream=True, stream_options={"include_usage": True}, **OPTIONS
    ) as stream:
        chunks = list(stream)

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_twenty_concurrent_streams_get_the_answers_that_they_get_alone(deployment: Deployment) -> None:
    def options(number: int) -> dict[str, Any]:
        model = deployment.model if number % 2 else BASE
        return {"model": model, "temperature": 0.5 * (number % 3), "seed": number, "max_tokens": 4 + number,
                "messages": [{"role": "user", "content": f"What color is crate {number}?"}]}  # fmt: skip

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{deployment.service.url}/v1", api_key=deployment.service.key
        ) as client:

            async def text_of(number: int) -> str:
                parts: list[str] = []
                async with await client.chat.completions.create(stream=True, **options(number)) as stream:
                    async for chunk in stream:
                        parts += [choice.delta.content or "" for choice in chunk.choices]
                return "".join(parts)

            return await asyncio.gather(*(text_of(number) for number in range(20)))

    with ThreadPoolExecutor(1) as pool:  # an earlier test's browser may have left an event loop in this thread
        found = pool.submit(lambda: asyncio.run(together())).result()

    with deployment.service.client() as client:
        alone = [client.chat.completions.create(**options(number)) for number in range(20)]
    assert found == [completion.choices[0].message.content for completion in alone]
    assert len(set(found)) > 10


def test_several_answers_with_stop_sequences_and_log_probabilities(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    completion = client.chat.completions.create(
        model=deployment.model,
        messages=QUESTION,
        n=3,
        seed=5,
        temperature=1.5,
        max_completion_tokens=20,
        stop=["e"],
        logprobs=True,
        top_logprobs=2,
    )

    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in completion.choices}) > 1
    for choice in completion.choices:
        assert "e" not in (choice.message.content or "")
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_text_completions_continue_each_prompt(deployment: Deployment, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": BASE, "temperature": 0, "max_tokens": 6}
    completion = client.completions.create(prompt=["The lorry is", "A bridge"], logprobs=1, **options)
    # Without strict validation: OpenAI's chunks have the finish_reason null, which the type of the client excludes.
    with openai.OpenAI(base_url=client.base_url, api_key=client.api_key) as lenient:
        streamed = list(lenient.completions.create(prompt="The lorry is", stream=True, **options))

    assert [choice.index for choice in completion.choices] == [0, 1]
    assert "".join(chunk.choices[0].text for chunk in streamed) == completion.choices[0].text
    assert streamed[-1].choices[0].finish_reason == completion.choices[0].finish_reason
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert "".join(logprobs.tokens).startswith(completion.choices[0].text)


def test_requests_while_a_job_trains_are_answered_and_change_no_bit_of_it(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    site = deployment.site
    job = site.submit(site.upload(60, seed=3), max_steps=60, lora={"rank": 4}, seed=9, checkpoint_every_steps=20)
    site.wait_for_step(2, job)

    answers = [
        client.chat.completions.create(model=deployment.model, **OPTIONS).choices[0].message.content for _ in range(10)
    ]

    site.wait_for_end(job)
    again = site.submit(site.upload(60, seed=3), max_steps=60, lora={"rank": 4}, seed=9, checkpoint_every_steps=20)
    site.wait_for_end(again)
    assert site.weights_digest(job) == site.weights_digest(again)
    assert len(set(answers)) == 1
    assert answers[0] == client.chat.completions.create(model=deployment.model, **OPTIONS).choices[0].message.content


def test_checkpoint_of_a_job_answers(deployment: Deployment, client: openai.OpenAI) -> None:
    site = deployment.site
    job = site.submit(site.upload(40), max_steps=8, lora={"rank": 4}, checkpoint_every_steps=4)
    site.wait_for_end(job)
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job).data[0].fine_tuned_model_checkpoint

    completion = client.chat.completions.create(model=checkpoint, **OPTIONS)

    assert completion.model == checkpoint
    assert completion.choices[0].message.content is not None


@pytest.mark.parametrize(
    ("change", "error", "code", "param"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "ft:nothing"}, openai.NotFoundError, "adapter_not_found", "model"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "invalid_row", "messages"),
        ({"extra_body": {"logit_bias": {"5": 1}}}, openai.BadRequestError, "unknown_parameter", "logit_bias"),
        ({"temperature": 3}, openai.BadRequestError, None, "temperature"),
        ({"top_logprobs": 3}, openai.BadRequestError, "invalid_value", "top_logprobs"),
        (
            {"tools": [{"type": "function", "function": {"name": "paint", "parameters": {}}}]},
            openai.BadRequestError,
            "template_without_tools",
            "tools",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_request_that_can_not_be_answered_is_an_error_that_names_the_field(
    client: openai.OpenAI,
    change: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str | None,
    param: str,
    stream: bool,
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": BASE, **OPTIONS, **change}, stream=stream)

    assert raised.value.param == param
    assert code is None or raised.value.code == code


def test_client_that_disconnects_frees_its_request(deployment: Deployment, client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=deployment.model, messages=QUESTION, temperature=2, max_tokens=200, stream=True
    ) as stream:
        next(iter(stream))

    assert client.chat.completions.create(model=deployment.model, **OPTIONS).choices

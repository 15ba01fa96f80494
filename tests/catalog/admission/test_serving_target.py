"""Jobs that their base model or serving endpoint does not support are rejected before training."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.errors import InvalidRequest, NotFound
from catalog.serving import endpoints
from catalog.serving.endpoints import NewEndpoint
from tests.catalog.world import PEPPER, World


def register(world: World, *, max_rank: int = 16, base_model: str = "smol") -> None:
    new = NewEndpoint(
        name="gpu", base_model=base_model, kind="vllm", url="http://h", adapter_folder="/f", max_rank=max_rank,
        api_key=None,
    )  # fmt: skip
    endpoints.register(world.db, project_id=world.caller.project_id, new=new, pepper=PEPPER)


@pytest.mark.parametrize("target", ["vllm", "gpu"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lora": {"use_dora": True}}, "vLLM does not support DoRA"),
        ({"lora": {"rank_pattern": {"q_proj": 4}}}, "vLLM ignores rank_pattern"),
    ],
)
def test_settings_that_vllm_does_not_support_are_rejected_with_the_reason(
    world: World, target: str, fields: dict[str, Any], reason: str
) -> None:
    register(world)

    with pytest.raises(InvalidRequest) as raised:
        world.submit(must_serve_on=target, **fields)

    assert (raised.value.code, raised.value.param) == ("not_servable", "must_serve_on")
    assert reason in raised.value.remedy


def test_rank_is_compared_with_that_of_the_endpoint(world: World) -> None:
    register(world, max_rank=16)

    with pytest.raises(InvalidRequest, match="must_serve_on") as raised:
        world.submit(must_serve_on="gpu", lora={"rank": 32})
    with pytest.raises(InvalidRequest):
        world.submit(must_serve_on="gpu", lora={"rank": 16, "init_lora_weights": "pissa"})

    assert "--max-lora-rank 32" in raised.value.remedy
    assert world.submit(must_serve_on="gpu", lora={"rank": 16}).requested["must_serve_on"] == "gpu"
    assert world.submit(must_serve_on="vllm", lora={"rank": 32}).id


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_architecture_without_lora_in_vllm_is_rejected(world: World, architecture: str) -> None:
    world.base("gpt", architecture=architecture)

    with pytest.raises(InvalidRequest) as raised:
        world.submit(model="gpt", must_serve_on="vllm")

    assert architecture in raised.value.remedy


def test_endpoint_must_exist_and_have_the_base_model(world: World) -> None:
    world.base("other")
    register(world, base_model="other")

    with pytest.raises(NotFound) as missing:
        world.submit(must_serve_on="none")
    with pytest.raises(InvalidRequest, match="has another base model: 'other'"):
        world.submit(must_serve_on="gpu")

    assert missing.value.param == "must_serve_on"


REMEDY = "lorry models add NAME SOURCE --chat-template chatml|gemma|llama3|zephyr|FILE"


@pytest.mark.parametrize(
    ("param", "training", "validation", "method"),
    [
        ("training_file", "chat", None, "supervised"),
        ("validation_file", "text", "chat", "supervised"),
        ("training_file", "preference", None, "dpo"),
    ],
)
def test_rows_that_need_a_template_are_rejected(
    world: World, param: str, training: str, validation: str | None, method: str
) -> None:
    base = world.base("plain", has_chat_template=False)
    files: dict[str, Any] = {"training_file": world.file(kind=training)}
    if validation is not None:
        files["validation_file"] = world.file(kind=validation)

    with pytest.raises(InvalidRequest, match="but base model 'plain' has no chat template") as refused:
        world.submit(model=base, method={"type": method}, **files)

    assert (refused.value.code, refused.value.param) == ("base_has_no_chat_template", param)
    assert files[param] in str(refused.value)
    assert REMEDY in str(refused.value.remedy)


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_rows_of_text_need_no_template(world: World, kind: str) -> None:
    base = world.base("plain", has_chat_template=False)

    assert world.submit(model=base, training_file=world.file(kind=kind)).base_model == "plain"


def test_conversations_are_accepted_if_there_is_a_template(world: World) -> None:
    base = world.base("chatty", has_chat_template=True)

    assert world.submit(model=base).base_model == "chatty"

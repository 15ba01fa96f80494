"""A job with must_serve_on is rejected before training if its adapter could not run there."""

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

"""API keys of serving endpoints are encrypted with the current pepper after a rotation."""

from __future__ import annotations

import pytest

from catalog.errors import Conflict
from catalog.pepper import Pepper
from catalog.serving import endpoints
from catalog.serving.endpoints import NewEndpoint
from catalog.tables.serving import ServingEndpoint
from tests.catalog.world import PEPPER, World

NEW = b"n" * 32


def registered(world: World, name: str, pepper: Pepper = PEPPER) -> str:
    """Register an endpoint with an API key. Returns its id."""
    new = NewEndpoint(
        name=name,
        base_model="smol",
        kind="vllm",
        url="http://127.0.0.1:8100",
        adapter_folder="/adapters",
        max_rank=16,
        api_key="very-secret",
    )
    return endpoints.register(world.db, project_id=world.caller.project_id, new=new, pepper=pepper).id


def test_api_keys_are_sealed_with_the_current_pepper(world: World) -> None:
    previous, lost, damaged = registered(world, "a"), registered(world, "b"), registered(world, "c")
    current = registered(world, "d", Pepper(current=NEW))
    with world.db.write() as session:
        session.get_one(ServingEndpoint, lost).sealed_key = session.get_one(ServingEndpoint, previous).sealed_key
        session.get_one(ServingEndpoint, damaged).sealed_key = "no base64!"

    num_sealed = [endpoints.seal_all(world.db, peppers=[NEW, PEPPER.current]) for _ in range(2)]

    assert num_sealed == [1, 0], "only the key that the previous pepper opens in its own row"
    with world.db.read() as session:
        for endpoint_id in (previous, current):
            assert endpoints.api_key(session.get_one(ServingEndpoint, endpoint_id), peppers=[NEW]) == "very-secret"
        for endpoint_id in (lost, damaged):
            with pytest.raises(Conflict, match="can't be decrypted"):
                endpoints.api_key(session.get_one(ServingEndpoint, endpoint_id), peppers=[NEW, PEPPER.current])

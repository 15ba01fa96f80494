"""Serving endpoints: a report that the server can't be started, and API keys after a rotation of the pepper."""

from __future__ import annotations

import pytest

from catalog.errors import Conflict
from catalog.pepper import Pepper
from catalog.serving import deployments, endpoints, keeping
from catalog.serving.endpoints import NewEndpoint
from catalog.tables.serving import Deployment, ServingEndpoint
from catalog.tasks.task_queue import TaskClaim, TaskKind
from tests.catalog.world import PEPPER, World, claim_task

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


def deployed(world: World) -> tuple[TaskClaim, str]:
    """Deploy an adapter on the endpoint a. Returns the claim of its keeper, and the deployment's id."""
    registered(world, "a")
    adapter = world.complete(world.running().claim_id)
    view = deployments.deploy(world.db, project_id=world.caller.project_id, adapter=adapter.name, endpoint="a")
    return claim_task(world.db, TaskKind.ENDPOINT), view.deployment.id


def deployment(world: World, deployment_id: str) -> Deployment:
    with world.db.read() as session:
        return session.get_one(Deployment, deployment_id)


def test_restart_of_the_server_resets_deployments_that_its_failure_has_failed(world: World) -> None:
    _, deployment_id = deployed(world)
    endpoints.report(world.db, "a", error="It crashed.")
    assert deployment(world, deployment_id).state == "failed"

    endpoints.report(world.db, "a", error=None)

    found = deployment(world, deployment_id)
    assert (found.state, found.last_error) == ("pending", "Endpoint 'a' is not ready yet.")


def test_restart_of_the_server_keeps_deployments_that_failed_for_another_reason(world: World) -> None:
    claim, deployment_id = deployed(world)
    keeping.note_failed(world.db, claim, deployment_id, state="failed", error="Its answers differ.")
    before = deployment(world, deployment_id)

    for error in ("It crashed.", None):
        endpoints.report(world.db, "a", error=error)

    after = deployment(world, deployment_id)
    assert (after.state, after.last_error, after.next_try_at) == ("failed", "Its answers differ.", before.next_try_at)


def test_attempt_that_ends_after_the_report_does_not_overwrite_it(world: World) -> None:
    claim, deployment_id = deployed(world)
    endpoints.report(world.db, "a", error="It crashed.")

    keeping.note_failed(world.db, claim, deployment_id, state="pending", error="The server does not answer.")

    found = deployment(world, deployment_id)
    assert (found.state, found.operator_error) == ("failed", "It crashed.")

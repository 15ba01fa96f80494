"""The highest priority of a project and of a key applies to every way of submission."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from catalog.audit import log
from catalog.audit.log import Filters
from catalog.errors import Forbidden
from catalog.plans import plans
from catalog.settings import Settings
from catalog.spec.job import PlannedJob
from catalog.spec.sweep import SweepRequest
from catalog.states import Priority
from catalog.sweeps import controller, creation, queries
from catalog.tables.tenancy import ApiKey, Project
from catalog.tenancy import api_keys, authentication
from catalog.tenancy.authentication import Caller
from catalog.usage import quotas
from tests.catalog.tenancy.test_api_keys import rotate
from tests.catalog.usage.test_quotas import files_of
from tests.catalog.world import PEPPER, World, request, sha


def operator(world: World) -> Caller:
    return replace(world.caller, is_operator=True)


def limit_project(world: World, highest: Priority) -> None:
    quotas.limit(world.db, caller=operator(world), project="ours", limits={}, highest_priority=highest)


def limit_key(world: World, highest: Priority) -> None:
    key_id = world.caller.api_key_id
    api_keys.limit(world.db, caller=operator(world), api_key_id=key_id, limits={}, highest_priority=highest)


def sweep(world: World, priority: Priority, **more: Any) -> SweepRequest:
    parameters = {"lora.rank": {"values": [2, 4, 8]}}
    body = {"model": "smol", **files_of(world), "search": {"type": "grid"}, "parameters": parameters}
    return SweepRequest.model_validate({**body, "priority": priority, **more})


def submitted(world: World, priority: Priority) -> None:
    world.submit(priority=priority)


def swept(world: World, priority: Priority) -> None:
    creation.create(world.db, caller=world.caller, request=sweep(world, priority), body_digest=sha(priority))


def planned(world: World, priority: Priority) -> None:
    body = request(training_file=world.file_id, priority=priority)
    plans.create(world.db, caller=world.caller, request=body, settings=Settings())


WAYS = [submitted, swept, planned]
LIMITS = [
    (limit_project, "project 'ours'", "lorry projects update ours"),
    (limit_key, "API key 'key'", "lorry keys update"),
]


@pytest.mark.parametrize("submit", WAYS)
@pytest.mark.parametrize(("limit", "owner", "command"), LIMITS)
def test_priority_above_the_limit_is_rejected_on_every_path(
    world: World,
    submit: Callable[[World, Priority], None],
    limit: Callable[[World, Priority], None],
    owner: str,
    command: str,
) -> None:
    limit(world, "normal")
    submit(world, "normal")
    submit(world, "batch")

    with pytest.raises(Forbidden) as refusal:
        submit(world, "urgent")

    error = refusal.value
    assert (error.status, error.code, error.param) == (403, "exceeds_own_rights", "priority")
    assert error.message == f"Priority 'urgent' is higher than 'normal', the maximum for {owner}."
    assert error.remedy.startswith("Use 'normal' or a lower priority, or ask an operator to raise the maximum: ")
    assert command in error.remedy
    assert "--highest-priority urgent" in error.remedy
    limit(world, "batch")
    with pytest.raises(Forbidden) as lowest:
        submit(world, "normal")
    assert lowest.value.remedy.startswith("Use 'batch', or ask an operator")
    limit(world, "urgent")
    submit(world, "urgent")


def test_priority_above_the_limits_of_project_and_key_names_the_lower_one(world: World) -> None:
    limit_project(world, "normal")
    limit_key(world, "batch")

    with pytest.raises(Forbidden) as refusal:
        submitted(world, "urgent")

    assert refusal.value.message == "Priority 'urgent' is higher than 'batch', the maximum for API key 'key'."
    assert refusal.value.remedy == (
        "Use 'batch', or ask an operator to raise the maximum: `lorry projects update ours --highest-priority urgent` "
        f"and `lorry keys update {world.caller.api_key_id} --highest-priority urgent`."
    )


def test_new_projects_and_keys_are_limited_to_normal_priority(world: World) -> None:
    with world.db.write() as session:
        project = Project(id="proj-new", organization_id=world.caller.organization_id, name="new", created_at=0.0)
        session.add(project)
    key, secret = api_keys.create(
        world.db, caller=operator(world), request=api_keys.KeyRequest(name="k", project="new"), pepper=PEPPER
    )

    caller = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)

    assert (project.highest_priority, key.highest_priority, caller.highest_priority) == (1, 1, 1)


def test_job_from_a_plan_is_checked_against_the_current_limit(world: World) -> None:
    world.queued()
    body = request(training_file=world.file_id, priority="urgent")
    plan = plans.create(world.db, caller=world.caller, request=body, settings=Settings())
    limit_project(world, "normal")

    with pytest.raises(Forbidden):
        world.send(PlannedJob(plan=plan.id), body_digest="p")  # pyright: ignore[reportArgumentType]


def test_future_trials_of_a_sweep_are_checked_against_the_limit(world: World) -> None:
    made = creation.create(
        world.db, caller=world.caller, request=sweep(world, "urgent", max_concurrent=1), body_digest="d"
    )
    limit_key(world, "normal")
    world.worker()

    world.prepare_all()
    for claim in world.claim():
        world.complete(claim.claim_id)
    while controller.advance(world.db):
        pass

    found = queries.get(world.db, project_id=world.caller.project_id, sweep_id=made.id).sweep
    assert (found.num_created, found.is_closed) == (1, True)
    assert (found.error or {})["code"] == "exceeds_own_rights"


def test_queued_jobs_keep_their_class_when_the_limit_is_lowered(world: World) -> None:
    job = world.queued(priority="urgent")
    limit_project(world, "batch")

    assert world.job(job.id).priority == 0


def test_only_operators_set_key_limits_and_rotation_keeps_them(world: World) -> None:
    limit_key(world, "urgent")
    remedies: list[str] = []
    for attempt in (
        lambda: api_keys.limit(
            world.db, caller=world.caller, api_key_id=world.caller.api_key_id, limits={}, highest_priority="urgent"
        ),
        lambda: api_keys.create(
            world.db,
            caller=world.caller,
            request=api_keys.KeyRequest(name="k", highest_priority="urgent"),
            pepper=PEPPER,
        ),
    ):
        with pytest.raises(Forbidden) as refusal:
            attempt()
        assert (refusal.value.code, refusal.value.param) == ("operator_required", "highest_priority")
        remedies.append(refusal.value.remedy)
    assert remedies == [
        f"Ask an operator to run `lorry keys update {world.caller.api_key_id} --highest-priority VALUE`.",
        "Omit 'highest_priority', or use an operator key.",
    ]

    child, _ = api_keys.create(world.db, caller=world.caller, request=api_keys.KeyRequest(name="k"), pepper=PEPPER)
    heir, _ = rotate(world, world.caller, world.caller.api_key_id)

    assert (child.highest_priority, heir.highest_priority) == (1, 0)


def test_audit_log_records_priority_limits(world: World) -> None:
    limit_project(world, "urgent")
    limit_key(world, "batch")

    found = log.list_page(world.db, caller=operator(world), filters=Filters()).items
    details = {event.type: event.details for event in found if event.type.endswith(".updated")}

    assert details["project.updated"] == {"limits": {"highest_priority": "urgent"}}
    assert details["api_key.updated"] == {"highest_priority": "batch"}
    with world.db.read() as session:
        assert session.get_one(ApiKey, world.caller.api_key_id).highest_priority == 2

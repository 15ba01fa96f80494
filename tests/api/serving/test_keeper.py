"""An endpoint's adapters follow its deployments: loaded, verified, loaded again after restarts, and unloaded."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from api.deps import Services
from api.serving import adapter_files, keeper
from api.serving.held_lease import LeaseLost
from api.serving.keeper import NOT_ANSWERED
from catalog.db.database import Database
from catalog.serving import keeping
from catalog.serving.keeping import EndpointWork
from catalog.tables.table import new_id
from catalog.tables.tasks import Task
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim, TaskKind
from tests.api.serving_engines import FakeVllm, ReferenceTrainer, serving
from tests.api.serving_site import ServingSite
from tests.api.site import until


def seen_by_operators(place: ServingSite) -> str | None:
    """Return the last error of the only deployment, as operators see it."""
    (found,) = place.operator.get("/v1/serving/endpoints/vllm-1/deployments").json()["data"]
    return found["last_error"]


def lease_expires_at(services: Services) -> float:
    with services.db.read() as session:
        return session.query(Task).one().lease_expires_at or 0.0


def test_deployed_adapter_is_loaded_from_the_folder_and_verified(place: ServingSite, trainer: ReferenceTrainer) -> None:
    deployment = place.deployed()

    (folder,) = place.folders()
    assert place.vllm.adapters == {place.adapter.name: str(folder)}
    assert json.loads((folder / "adapter_config.json").read_text()) == {"r": 16}
    assert (folder / "adapter_config.json").stat().st_mode & 0o444 == 0o444
    verified = deployment["verification"]
    assert verified["passed"]
    assert verified["distinguishes"]
    assert verified["max_diff"] == 0
    assert verified["num_compared"] == 6
    assert sorted(trainer.answered) == ["base", place.adapter.name]
    assert place.endpoint()["verification"]["passed"]


def test_base_model_without_a_chat_template_is_probed_with_a_text(
    place: ServingSite, trainer: ReferenceTrainer
) -> None:
    trainer.has_template = False

    place.deployed()

    assert {path for path, _ in place.vllm.requests if "completions" in path} == {"/v1/completions"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"ignores_adapters": True}, "differs from the record"), ({"max_rank": 8}, "greater than max_lora_rank 8")],
)
def test_adapter_that_the_server_does_not_serve_as_recorded_fails_and_is_not_used(
    place: ServingSite, trainer: ReferenceTrainer, change: dict[str, object], reason: str
) -> None:
    for name, value in change.items():
        setattr(place.vllm, name, value)
    place.register()
    place.deploy()

    deployment = place.wait_for("failed")

    assert reason in deployment["last_error"] + str(seen_by_operators(place))
    until(lambda: place.vllm.adapters == {})
    place.ask()
    assert place.vllm.completions() == []


def test_adapter_is_unloaded_before_its_failure_is_recorded(place: ServingSite, trainer: ReferenceTrainer) -> None:
    place.vllm.ignores_adapters = True
    place.vllm.holds = "/v1/unload_lora_adapter"
    place.register()
    place.deploy()

    until(lambda: place.vllm.has_received("/v1/unload_lora_adapter"))
    assert place.deployments()[0]["state"] == "pending"
    place.vllm.released.set()

    place.wait_for("failed")


def test_failed_adapter_is_tried_again(place: ServingSite, trainer: ReferenceTrainer) -> None:
    place.vllm.max_rank = 8
    place.register()
    place.deploy()
    place.wait_for("failed")

    place.vllm.max_rank = 16

    assert place.wait_for("ready")["last_error"] is None


def test_check_that_has_missed_a_failure_does_not_repeat_the_attempt(
    place: ServingSite, trainer: ReferenceTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "WAITS_SECONDS", (3600.0,))
    monkeypatch.setattr(keeper, "LOOK_SECONDS", 0.05)
    place.vllm.ignores_adapters = True
    place.vllm.holds = "/v1/unload_lora_adapter"
    read, outdated = keeping.read, list[EndpointWork]()

    def read_outdated(db: Database, claim: TaskClaim) -> EndpointWork | None:
        """Return the first work that has the adapter and is read during its attempt; return it after the failure."""
        work = read(db, claim)
        if not outdated and work is not None and place.vllm.has_received("/v1/unload_lora_adapter"):
            outdated.append(work)
            place.vllm.released.set()
            until(lambda: place.deployments()[0]["state"] == "failed")
        elif outdated and work is not None:
            outdated.append(work)
        return work

    monkeypatch.setattr(keeping, "read", read_outdated)
    place.register()
    place.deploy()

    until(lambda: len(outdated) > 2)

    assert outdated[0].adapters[0].state == "pending"
    assert [path for path, _ in place.vllm.requests].count("/v1/load_lora_adapter") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"drift": -2.0}, "differs from the record"),
        ({"prompt_tokens": 99}, "as 99 tokens, but Lorry as 12: tokenizers or chat templates differ"),
        ({"api_key": "secret"}, "--api-key-file"),
        ({"fails_with": 500}, "It failed."),
    ],
)
def test_endpoint_whose_base_model_does_not_answer_as_recorded_is_rejected(
    place: ServingSite, trainer: ReferenceTrainer, change: dict[str, object], reason: str
) -> None:
    for name, value in change.items():
        setattr(place.vllm, name, value)
    place.register()
    place.deploy()

    until(lambda: place.endpoint()["state"] == "rejected")

    assert reason in place.endpoint()["last_error"]
    assert place.vllm.adapters == {}
    place.ask(place.adapter.base_model)
    assert place.vllm.completions() == []


def test_missing_route_names_the_setting_of_vllm(place: ServingSite, trainer: ReferenceTrainer) -> None:
    place.vllm.allows_updates = False
    place.register()
    place.deploy()

    place.wait_for("failed")
    error = str(seen_by_operators(place))

    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in error
    assert "--enable-lora" in error


def test_api_key_is_sent_and_never_shown(place: ServingSite, trainer: ReferenceTrainer, services: Services) -> None:
    place.vllm.api_key = "very-secret"
    shown = place.register(api_key="very-secret")
    place.deploy()
    place.wait_for("ready")

    assert shown["has_api_key"]
    assert "very-secret" not in json.dumps([shown, place.endpoint()])
    assert services.db.engine.connect().exec_driver_sql("select sealed_key from serving_endpoints").scalar()


def test_adapter_is_loaded_again_after_a_restart_of_the_server(place: ServingSite, trainer: ReferenceTrainer) -> None:
    place.deployed()

    place.vllm.adapters.clear()

    until(lambda: place.adapter.name in place.vllm.adapters)
    place.wait_for("ready")
    assert len(trainer.answered) == 2  # references are computed once


def test_endpoint_that_stops_is_unreachable_until_it_returns(
    place: ServingSite, trainer: ReferenceTrainer, services: Services
) -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(serving(FakeVllm()))
        place.vllm = fake
        place.deployed()
        port = urlsplit(fake.url).port
        stack.close()
        fake.adapters.clear()
        place.wait_for("pending", endpoint_state="unreachable")
        assert "failed" in place.endpoint()["last_error"]

        with serving(fake, port=port or 0):
            place.wait_for("ready")
            assert place.adapter.name in fake.adapters


def test_endpoint_is_pending_until_its_server_has_started(place: ServingSite, trainer: ReferenceTrainer) -> None:
    with ExitStack() as stack:
        fake = stack.enter_context(serving(FakeVllm()))
        port = urlsplit(fake.url).port
        stack.close()
        place.vllm = fake
        place.register()
        waiting = "Endpoint 'vllm-1' is not ready yet."
        assert place.deploy().json()["last_error"] == waiting

        until(lambda: place.endpoint()["checked_at"] is not None)

        starting = place.endpoint()
        assert starting["state"] == "pending"
        assert starting["last_error"].startswith(f"{NOT_ANSWERED} GET /v1/models failed: ")
        until(lambda: seen_by_operators(place) == f"{waiting} {starting['last_error']}")
        assert place.deployments()[0]["last_error"] == waiting
        with serving(fake, port=port or 0):
            place.wait_for("ready")
        until(lambda: place.endpoint()["state"] == "unreachable")


def test_undeployed_adapter_is_unloaded_and_its_files_are_removed(
    place: ServingSite, trainer: ReferenceTrainer
) -> None:
    place.deployed()

    deleted = place.client.delete(f"/v1/adapters/{place.adapter.id}/deployments/vllm-1")

    assert deleted.json()["deleted"]
    until(lambda: place.deployments() == [])
    assert place.vllm.adapters == {}
    assert place.folders() == []


def test_deleted_adapter_is_unloaded(place: ServingSite, trainer: ReferenceTrainer, services: Services) -> None:
    place.deployed()

    place.client.delete(f"/v1/adapters/{place.adapter.id}")

    until(lambda: place.vllm.adapters == {})
    until(lambda: place.operator.get("/v1/serving/endpoints/vllm-1/deployments").json()["data"] == [])
    assert place.folders() == []


def test_adapter_that_lorry_loaded_and_forgot_is_unloaded_but_others_stay(
    place: ServingSite, trainer: ReferenceTrainer
) -> None:
    place.deployed()
    own = place.endpoint_folder(place.endpoint()["id"]) / "adapter-old-123"

    place.vllm.adapters |= {"ft:old": str(own), "by-hand": "/models/by-hand"}

    until(lambda: set(place.vllm.adapters) == {place.adapter.name, "by-hand"})


def test_removed_endpoint_unloads_its_adapters_and_frees_its_name(
    place: ServingSite, trainer: ReferenceTrainer
) -> None:
    place.deployed()

    assert place.operator.delete("/v1/serving/endpoints/vllm-1").status_code == 200

    until(lambda: place.operator.get("/v1/serving/endpoints").json()["data"] == [])
    until(lambda: place.deployments() == [])
    assert place.vllm.adapters == {}
    until(lambda: not place.folders())
    place.register()


def test_damaged_files_in_the_folder_are_replaced_before_a_load(place: ServingSite, trainer: ReferenceTrainer) -> None:
    place.deployed()
    (folder,) = place.folders()
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(b"x" * len(content))

    place.vllm.adapters.clear()

    until(lambda: place.adapter.name in place.vllm.adapters)
    assert weights.read_bytes() == content


def test_endpoint_waits_for_a_worker_that_computes_the_reference(
    place: ServingSite, world: object, services: Services
) -> None:
    with services.db.engine.begin() as connection:
        connection.exec_driver_sql("delete from workers")
    place.register()

    until(lambda: "No worker is running" in (place.endpoint()["last_error"] or ""))

    assert place.endpoint()["state"] == "pending"


def test_one_process_at_a_time_keeps_an_endpoint(place: ServingSite, trainer: ReferenceTrainer) -> None:
    place.deployed()

    assert task_queue.claim(place.services.db, [TaskKind.ENDPOINT], lease_seconds=60) is None


@pytest.mark.parametrize("is_same_folder", [True, False])
def test_adapter_that_a_removed_endpoint_left_loaded_is_replaced(
    place: ServingSite, trainer: ReferenceTrainer, tmp_path: Path, is_same_folder: bool
) -> None:
    gone = (place.folder if is_same_folder else tmp_path) / place.endpoint_folder(new_id("endpoint")).name
    place.vllm.adapters[place.adapter.name] = str(gone / f"{place.adapter.id}-{'0' * 12}")

    place.deployed()

    assert place.vllm.adapters == {place.adapter.name: str(place.folders()[0])}


def test_adapter_with_other_content_in_the_endpoints_folder_is_replaced(
    place: ServingSite, trainer: ReferenceTrainer
) -> None:
    place.deployed()
    (folder,) = place.folders()

    place.vllm.adapters[place.adapter.name] = str(folder.with_name(f"{place.adapter.id}-{'0' * 12}"))

    until(lambda: place.vllm.adapters == {place.adapter.name: str(folder)})


def test_left_over_adapters_are_unloaded_but_those_of_others_stay(
    place: ServingSite, trainer: ReferenceTrainer, tmp_path: Path
) -> None:
    gone, adapter = place.endpoint_folder(new_id("endpoint")), f"{new_id('adapter')}-{'0' * 12}"
    place.register("vllm-2", url="http://127.0.0.1:9")
    others = {
        "of-another-endpoint": str(place.endpoint_folder(place.endpoint("vllm-2")["id"]) / adapter),
        "by-hand": str(place.folder / "by-hand"),
    }
    moved = tmp_path / "moved" / gone.name
    place.vllm.adapters |= {"ft:old": str(gone / adapter), "ft:moved": str(moved / adapter), **others}

    place.deployed()

    until(lambda: set(place.vllm.adapters) == {place.adapter.name, *others})


def test_services_that_share_server_and_folder_leave_the_adapters_of_each_other_alone(
    place: ServingSite, trainer: ReferenceTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    of_other = place.endpoint_folder(new_id("endpoint"), service_id=new_id("org").removeprefix("org-"))
    theirs = of_other / f"{new_id('adapter')}-{'0' * 12}"
    theirs.mkdir(parents=True)
    place.vllm.adapters["ft:theirs"] = str(theirs)

    with caplog.at_level(logging.INFO, "lorry.api"):
        place.deployed()
        place.client.delete(f"/v1/adapters/{place.adapter.id}/deployments/vllm-1")
        until(lambda: place.deployments() == [])
        place.operator.delete("/v1/serving/endpoints/vllm-1")
        until(lambda: place.operator.get("/v1/serving/endpoints").json()["data"] == [])

    assert place.vllm.adapters == {"ft:theirs": str(theirs)}
    assert theirs.is_dir()
    assert "adapters that this service has not loaded: ft:theirs" in caplog.text


def test_adapter_that_somebody_else_loaded_under_the_name_is_not_replaced(
    place: ServingSite, trainer: ReferenceTrainer
) -> None:
    place.vllm.adapters[place.adapter.name] = "/models/by-hand"
    place.register()
    place.deploy()

    deployment = place.wait_for("failed")

    assert place.vllm.adapters == {place.adapter.name: "/models/by-hand"}
    assert "/models/by-hand" in str(seen_by_operators(place))
    assert "/models" not in deployment["last_error"]
    assert "lorry serving deployments vllm-1" in deployment["last_error"]


def test_files_that_cannot_be_removed_stop_nothing(
    place: ServingSite, trainer: ReferenceTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place.deployed()

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(adapter_files, "remove_others", refuses)
    place.client.delete(f"/v1/adapters/{place.adapter.id}/deployments/vllm-1")

    until(lambda: place.deployments() == [])
    assert "can't be removed: read-only" in caplog.text


def test_copy_of_an_adapter_stops_when_its_deployment_is_deleted(
    place: ServingSite, trainer: ReferenceTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, has_stopped, has_completed = (threading.Event() for _ in range(3))

    def copy(*_: object, check: Callable[[], None]) -> None:
        has_begun.set()
        try:
            while not has_completed.wait(0.01):
                check()
        except LeaseLost:
            has_stopped.set()
            raise

    monkeypatch.setattr(adapter_files, "put", copy)
    try:
        place.register()
        place.deploy()
        until(has_begun.is_set)

        place.client.delete(f"/v1/adapters/{place.adapter.id}/deployments/vllm-1")

        until(has_stopped.is_set)
        until(lambda: place.deployments() == [])
    finally:
        has_completed.set()


def test_projects_do_not_see_the_text_of_the_server(place: ServingSite, trainer: ReferenceTrainer) -> None:
    place.vllm.max_rank = 8
    place.register()
    place.deploy()
    shown = place.wait_for("failed")["last_error"]

    assert "/v1/load_lora_adapter" not in shown
    assert "/v1/load_lora_adapter returned 500" in str(seen_by_operators(place))
    place.vllm.max_rank = 16
    place.wait_for("ready")
    place.vllm.holds = "/v1/load_lora_adapter"
    place.vllm.adapters.clear()
    place.ask()
    until(lambda: place.deployments()[0]["state"] == "pending")
    assert "/v1" not in (place.deployments()[0]["last_error"] or "")


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_lease_is_renewed_while_the_server_is_slow(
    place: ServingSite, trainer: ReferenceTrainer, services: Services, path: str
) -> None:
    place.vllm.holds = path
    place.register()
    place.deploy()
    if path.endswith("unload_lora_adapter"):
        place.wait_for("ready")
        place.client.delete(f"/v1/adapters/{place.adapter.id}/deployments/vllm-1")
    until(lambda: place.vllm.has_received(path))

    for _ in range(3):
        before = lease_expires_at(services)
        until(lambda before=before: lease_expires_at(services) > before)


def test_keeper_that_has_lost_its_lease_stops(
    place: ServingSite, trainer: ReferenceTrainer, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    place.vllm.holds = "/v1/load_lora_adapter"
    place.register()
    place.deploy()
    until(lambda: place.vllm.has_received("/v1/load_lora_adapter"))

    with caplog.at_level(logging.WARNING, "lorry.api"), services.db.write() as session:
        session.query(Task).one().claim_id = "task-other"
    until(lambda: "the lease is lost" in caplog.text)
    place.vllm.requests.clear()
    place.vllm.released.set()

    until(lambda: place.adapter.name in place.vllm.adapters)
    place.deploy()  # it wakes keepers
    assert place.vllm.requests == []
    assert place.deployments()[0]["state"] == "pending"


def test_deployment_on_a_server_that_can_not_be_started_fails_at_once(place: ServingSite) -> None:
    place.register(url="http://127.0.0.1:9")
    assert place.deploy().json()["state"] == "pending"

    place.report("The log ends with 'ImportError'.")

    assert (place.endpoint()["state"], place.deployments()[0]["state"]) == ("failed", "failed")
    assert "can't be started" in place.deployments()[0]["last_error"]
    assert seen_by_operators(place) == "The log ends with 'ImportError'."
    assert place.deploy().json()["state"] == "failed"


def test_server_that_can_not_be_started_stays_failed_until_it_is_started_again(
    place: ServingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "LOOK_SECONDS", 0.05)
    checks = list[str]()
    monkeypatch.setattr(keeping, "read", recording(keeping.read, checks))
    place.register(url="http://127.0.0.1:9")
    until(lambda: place.endpoint()["checked_at"] is not None)

    place.report("It crashed.")
    seen = len(checks)
    until(lambda: len(checks) > seen + 3)
    assert place.endpoint()["last_error"] == "It crashed."

    place.report(None)
    until(lambda: NOT_ANSWERED in (place.endpoint()["last_error"] or ""))
    assert place.endpoint()["state"] == "pending"


def test_check_that_began_before_the_report_does_not_overwrite_it(place: ServingSite, services: Services) -> None:
    endpoint_id = place.register(url="http://127.0.0.1:9")["id"]
    until(lambda: place.endpoint()["checked_at"] is not None)
    with services.db.read() as session:
        claim_id = session.get_one(Task, (TaskKind.ENDPOINT, endpoint_id)).claim_id or ""
    claim = TaskClaim(claim_id=claim_id, kind=TaskKind.ENDPOINT, subject=endpoint_id, num_attempts=1)
    place.report("It crashed.")

    keeping.note_unusable(services.db, claim, state="unreachable", error="No response.", is_silent=True)

    assert (place.endpoint()["state"], place.endpoint()["last_error"]) == ("failed", "It crashed.")


def test_server_that_answers_after_a_failure_is_used_again(place: ServingSite, trainer: ReferenceTrainer) -> None:
    place.register()
    place.report("It crashed.")
    assert place.deploy().json()["state"] == "failed"

    assert place.wait_for("ready")["last_error"] is None


def recording(
    read: Callable[[Database, TaskClaim], EndpointWork | None], checks: list[str]
) -> Callable[[Database, TaskClaim], EndpointWork | None]:
    def record(db: Database, claim: TaskClaim) -> EndpointWork | None:
        checks.append(claim.subject)
        return read(db, claim)

    return record

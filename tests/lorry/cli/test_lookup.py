"""A unique prefix of an ID, or a unique part of an adapter's name, is resolved to the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

from lorry.cli import lookup
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
FULL = "ftjob-3f2b8c9d0a1e4f5a6b7c8d9e"
OTHER = "ftjob-3f77aa9d0a1e4f5a6b7c8d9e"
Run = Callable[..., Result]


def listed(*ids: str, **fields: Any) -> dict[str, Any]:
    return {"data": [{"id": one, **fields} for one in ids], "has_more": False}


@pytest.fixture
def jobs(service: Script) -> None:
    service.on("GET", JOBS, listed(FULL, OTHER))
    service.on("POST", f"{JOBS}/{FULL}/pause", {"id": FULL, "status": "paused"})


@pytest.mark.usefixtures("jobs")
def test_unique_id_prefix_is_resolved(service: Script, run: Run) -> None:
    assert run("jobs", "pause", "ftjob-3f2").exit_code == 0
    assert len(service.requests("POST", f"{JOBS}/{FULL}/pause")) == 1


@pytest.mark.usefixtures("jobs")
def test_ambiguous_id_prefix_lists_the_candidates_and_changes_nothing(service: Script, run: Run) -> None:
    result = run("jobs", "pause", "ftjob-3f")

    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: 'ftjob-3f' matches 2 jobs:",
        f"  {FULL}",
        f"  {OTHER}",
        "Type more of the ID, from its beginning, or use the full ID.",
    ]
    assert service.requests("POST", f"{JOBS}/{FULL}/pause") == []


@pytest.mark.usefixtures("jobs")
def test_full_id_needs_no_lookup(service: Script, run: Run) -> None:
    run("jobs", "pause", FULL)

    assert [request.method for request in service.seen] == ["POST"]


@pytest.mark.usefixtures("jobs")
def test_id_that_is_a_prefix_of_another_id_is_unambiguous(service: Script, run: Run) -> None:
    service.on("GET", "/v1/workers", listed("box", "box-2"))
    service.on("POST", "/v1/workers/box/cordon", {"id": "box"})

    assert run("workers", "cordon", "box").exit_code == 0


def test_unmatched_prefix_is_sent_unchanged(service: Script, run: Run) -> None:
    error = {"message": "No job with the ID 'x'.", "code": "job_not_found", "remedy": "Check it."}
    service.on("GET", JOBS, listed(FULL))
    service.on("GET", f"{JOBS}/x", Reply(status=404, body={"error": error}))

    assert run("jobs", "show", "x").stderr == "Error: No job with the ID 'x'.\nCheck it.\n"


def test_key_without_the_scope_to_list_can_still_act_on_a_full_id(service: Script, run: Run) -> None:
    service.on("GET", JOBS, Reply(status=403, body={"error": {"message": "No.", "code": "missing_scope"}}))
    service.on("POST", f"{JOBS}/j/pause", {"id": "j", "status": "paused"})

    assert run("jobs", "pause", "j").exit_code == 0


def failed(status: int) -> Reply:
    error = {"message": "The service can't answer.", "code": "x", "remedy": "Do something."}
    return Reply(status=status, body={"error": error}, headers={"x-should-retry": "false"})


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_failed_search_for_an_id_is_reported_as_such(service: Script, run: Run, status: int) -> None:
    service.on("GET", JOBS, failed(status))

    result = run("jobs", "pause", "ftjob-3f2")

    assert result.exit_code == 1
    assert result.stderr == "Error: The service can't answer.\nDo something.\n"
    assert [request.method for request in service.seen] == ["GET"]


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
@pytest.mark.parametrize("failing", ["/v1/adapters/support", "/v1/adapters", JOBS])
def test_failed_search_for_an_adapter_is_reported_as_such(service: Script, run: Run, failing: str, status: int) -> None:
    answers = {"/v1/adapters/support": failed(404), "/v1/adapters": listed(), JOBS: listed()}
    for path, answer in (answers | {failing: failed(status)}).items():
        service.on("GET", path, answer)

    result = run("adapters", "delete", "support", "--yes")

    assert result.exit_code == 1
    assert result.stderr == "Error: The service can't answer.\nDo something.\n"
    assert service.seen[-1].path.partition("?")[0] == failing, "no request follows the failed one"


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("failing", [("/v1/adapters", JOBS), (JOBS,)])
def test_key_without_the_scope_to_list_can_still_act_on_an_adapter(
    service: Script, run: Run, failing: tuple[str, ...], status: int
) -> None:
    answers = {"/v1/adapters/support": failed(404), "/v1/adapters": listed(), JOBS: listed()}
    for path, answer in (answers | dict.fromkeys(failing, failed(status))).items():
        service.on("GET", path, answer)
    service.on("GET", "/v1/fine_tuning/checkpoints/support/permissions", {"data": []})

    result = run("adapters", "shares", "support")

    assert result.exit_code == 0, result.stderr


def test_prefix_is_ambiguous_if_not_all_objects_were_searched(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "SEARCHED", 1)
    service.on("GET", JOBS, listed(FULL, "ftjob-9"))

    result = run("jobs", "show", "ftjob-3f")

    assert result.exit_code == 1
    assert "may match more than one job: only the newest 1 were searched" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "listing", "item", "expected_request"),
    [
        ("files show file-3", "/v1/files", "file-3f2b", ("GET", "/v1/files/file-3f2b")),
        ("files delete file-3 -y", "/v1/files", "file-3f2b", ("DELETE", "/v1/files/file-3f2b")),
        ("keys show key-3", "/v1/api_keys", "key-3f2b", ("GET", "/v1/api_keys/key-3f2b")),
        ("keys revoke key-3 -y", "/v1/api_keys", "key-3f2b", ("POST", "/v1/api_keys/key-3f2b/revoke")),
        ("batches show batch-3", "/v1/batches", "batch-3f2b", ("GET", "/v1/batches/batch-3f2b")),
        ("plans show plan-3", "/v1/plans", "plan-3f2b", ("GET", "/v1/plans/plan-3f2b")),
        ("plans delete plan-3 -y", "/v1/plans", "plan-3f2b", ("DELETE", "/v1/plans/plan-3f2b")),
        ("sweeps close sweep-3 -y", "/v1/sweeps", "sweep-3f2b", ("POST", "/v1/sweeps/sweep-3f2b/close")),
        (
            "webhooks show webhook-3",
            "/v1/webhook_endpoints",
            "webhook-3f2b",
            ("GET", "/v1/webhook_endpoints/webhook-3f2b"),
        ),
        ("workers drain work", "/v1/workers", "worker-a", ("POST", "/v1/workers/worker-a/drain")),
        ("projects restore proj-3", "/v1/projects", "proj-3f2b", ("POST", "/v1/projects/proj-3f2b/restore")),
        (
            "organizations show org-3",
            "/v1/organizations",
            "org-3f2b",
            ("GET", "/v1/organizations/org-3f2b"),
        ),
    ],
)
def test_every_kind_of_id_can_be_abbreviated(
    service: Script, run: Run, arguments: str, listing: str, item: str, expected_request: tuple[str, str]
) -> None:
    service.on("GET", listing, listed(item))
    service.on(*expected_request, {"id": item})

    result = run(*arguments.split())

    assert result.exit_code == 0, result.stderr
    assert len(service.requests(*expected_request)) == 1


def test_unique_adapter_suffix_is_resolved(service: Script, run: Run) -> None:
    service.on("GET", "/v1/adapters/t", Reply(status=404, body={}))
    service.on("GET", "/v1/adapters", {"data": [{"id": "a", "name": "ft:m:p:s:1"}, {"id": "b", "name": "ft:m:p:t:2"}]})
    service.on("GET", "/v1/adapters/ft%3Am%3Ap%3At%3A2", {"id": "b", "name": "ft:m:p:t:2", "rank": 4})
    service.on("GET", "/v1/adapters/ft%3Am%3Ap%3At%3A2/deployments", {"data": []})

    assert "ft:m:p:t:2" in run("adapters", "show", "t").stdout


def test_ambiguous_adapter_suffix_lists_the_candidates(service: Script, run: Run) -> None:
    names = ("ft:m:p:docs:1", "ft:m:p:docs:2")
    service.on("GET", "/v1/adapters/docs", Reply(status=404, body={}))
    service.on("GET", "/v1/adapters", {"data": [{"id": f"adapter-{name[-1]}", "name": name} for name in names]})

    result = run("adapters", "delete", "docs", "--yes")

    assert result.exit_code == 1
    assert result.stderr.splitlines()[:3] == ["Error: 'docs' matches 2 adapters:", *(f"  {name}" for name in names)]
    assert not any(request.method == "DELETE" for request in service.seen)


def test_suffix_of_a_running_job_is_explained(service: Script, run: Run) -> None:
    service.on("GET", "/v1/adapters", listed())
    service.on("GET", "/v1/adapters/support", Reply(status=404, body={"error": {"message": "none"}}))
    job = {"suffix": "support", "status": "running", "fine_tuned_model": None}
    service.on("GET", JOBS, {"data": [{"id": OTHER, "suffix": "faq"}, {"id": FULL, **job}], "has_more": False})

    result = run("adapters", "pull", "support")

    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: Job {FULL} has no final adapter. Its status is running.",
        f"Wait until the job succeeds, or use one of its checkpoints: `lorry jobs checkpoints {FULL}`",
    ]


def test_job_id_is_accepted_as_the_parent(service: Script, submit: Run) -> None:
    service.on("GET", f"{JOBS}/{FULL}", {"id": FULL, "status": "succeeded", "fine_tuned_model": "ft:m:p:s:1"})
    service.on("POST", JOBS, {"id": "ftjob-new"})

    submit("m", "train.jsonl", "--parent", FULL)

    (sent,) = service.requests("POST", JOBS)
    assert json.loads(sent.body)["parent_adapter"] == "ft:m:p:s:1"


def test_submit_accepts_abbreviated_file_and_plan_ids(service: Script, run: Run) -> None:
    service.on("GET", "/v1/files", listed("file-3f2b"))
    service.on("GET", "/v1/plans", listed("plan-3f2b"))
    service.on("POST", JOBS, {"id": "ftjob-new"})

    run("jobs", "submit", "m", "file-3")
    run("jobs", "submit", "--plan", "plan-3")

    first, second = (json.loads(sent.body) for sent in service.requests("POST", JOBS))
    assert first["training_file"] == "file-3f2b"
    assert second == {"plan": "plan-3f2b"}


@pytest.mark.parametrize("typed", ["search", "proj-2", "cp-1"])
def test_unshare_accepts_a_project_or_a_permission(service: Script, run: Run, typed: str) -> None:
    path = "/v1/fine_tuning/checkpoints/a/permissions"
    service.on("GET", "/v1/adapters/a", {"id": "a", "name": "a"})
    service.on("GET", path, {"data": [{"id": "cp-1", "project_id": "proj-2f"}, {"id": "cp-2", "project_id": "proj-9"}]})
    service.on("GET", "/v1/projects/search", {"id": "proj-2f", "name": "search"})
    service.on("DELETE", f"{path}/cp-1", {})

    result = run("adapters", "unshare", "a", typed)

    assert result.exit_code == 0, result.stderr
    assert len(service.requests("DELETE", f"{path}/cp-1")) == 1

"""from_openai translates the settings of an OpenAI job, and reports the settings that it skips."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from catalog.spec.job import JobRequest
from tests.lorry.scripted_server import Reply, Script, serving

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import from_openai  # pyright: ignore[reportMissingImports]

DATA = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
JOB: dict[str, Any] = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "created_at": 1700000000,
    "model": "gpt-4o-mini-2024-07-18",
    "fine_tuned_model": "ft:gpt-4o-mini-2024-07-18:acme:support bot:Abc123",
    "organization_id": "org-1",
    "result_files": ["file-results"],
    "status": "succeeded",
    "seed": 42,
    "training_file": "file-theirs",
    "validation_file": None,
    "hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.8},
    "method": {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.8}},
    },
    "metadata": {"team": "search"},
    "integrations": [{"type": "wandb", "wandb": {"project": "p"}}],
}


def test_equivalent_settings_are_kept_and_others_are_reported() -> None:
    body, skipped = from_openai.translated(JOB, model="smol")

    assert body == {
        "model": "smol",
        "seed": 42,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}}},
        "suffix": "support-bot",
        "metadata": {"team": "search"},
    }
    assert [line.partition(":")[0] for line in skipped] == [
        "learning_rate_multiplier=1.8",
        "suffix 'support bot'",
        "integrations",
    ]


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}}},
            {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
        ),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}}, {"type": "dpo"}),
        (
            {"method": None, "hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
            {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        ),
        (
            {"method": None, "hyperparameters": {"n_epochs": 2, "batch_size": 2048}},
            {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        ),
        ({"method": {"type": "supervised", "supervised": None}, "hyperparameters": {}}, {"type": "supervised"}),
    ],
)
def test_only_explicit_hyperparameters_are_kept(changes: dict[str, Any], method: dict[str, Any]) -> None:
    body, _ = from_openai.translated({**JOB, **changes}, model="smol")

    assert body["method"] == method
    JobRequest.model_validate({**body, "training_file": "file-1"})


def test_learning_rate_multiplier_is_kept_on_request() -> None:
    body, skipped = from_openai.translated(JOB, model="smol", keep_rate=True)

    assert body["method"]["supervised"]["hyperparameters"]["learning_rate_multiplier"] == 1.8
    assert not any("learning_rate" in line for line in skipped)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Script, Script]]:
    """Serve scripted OpenAI and Lorry APIs."""
    with serving() as theirs, serving() as ours:
        for name, value in {
            "OPENAI_BASE_URL": f"{theirs.url}/v1",
            "OPENAI_API_KEY": "sk-x",
            "LORRY_URL": ours.url,
            "LORRY_API_KEY": "k",
        }.items():
            monkeypatch.setenv(name, value)
        theirs.on("GET", "/v1/fine_tuning/jobs/ftjob-1", JOB)
        theirs.on("GET", "/v1/files/file-theirs", {"id": "file-theirs", "filename": "chats.jsonl"})
        ours.on("GET", "/v1/models/smol", {"id": "smol", "object": "model", "created": 1, "owned_by": "lorry"})
        ours.on("POST", "/v1/files", {"id": "file-ours"})
        ours.on("POST", "/v1/fine_tuning/jobs", {"id": "ftjob-new"})
        yield theirs, ours


def test_job_and_its_data_are_copied(servers: tuple[Script, Script], capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = servers
    theirs.on("GET", "/v1/files/file-theirs/content", Reply(body=DATA))

    assert from_openai.main(["ftjob-1", "--model", "smol"]) == 0

    printed = capsys.readouterr()
    assert printed.out == "ftjob-new\n"
    assert "Skipped: integrations" in printed.err
    (uploaded,) = ours.requests("POST", "/v1/files")
    assert DATA in uploaded.body
    assert b'filename="chats.jsonl"' in uploaded.body
    (created,) = ours.requests("POST", "/v1/fine_tuning/jobs")
    body = json.loads(created.body)
    assert (body["training_file"], body["seed"], body["metadata"]) == ("file-ours", 42, {"team": "search"})
    JobRequest.model_validate(body)


def test_dry_run_prints_the_request_and_sends_nothing(
    servers: tuple[Script, Script], capsys: pytest.CaptureFixture[str]
) -> None:
    _, ours = servers

    assert from_openai.main(["ftjob-1", "--model", "smol", "--validation", "file-v", "--dry-run"]) == 0

    body = json.loads(capsys.readouterr().out)
    assert (body["training_file"], body["validation_file"]) == ("a copy of file-theirs", "file-v")
    assert ours.seen == []


def test_missing_model_is_reported_before_anything_is_copied(
    servers: tuple[Script, Script], capsys: pytest.CaptureFixture[str]
) -> None:
    _, ours = servers
    error = {"message": "No model with the ID 'large'.", "type": "x", "param": None, "code": "model_not_found"}
    ours.on("GET", "/v1/models/large", Reply(status=404, body={"error": error}))

    assert from_openai.main(["ftjob-1", "--model", "large"]) == 1

    assert "No model with the ID 'large'." in capsys.readouterr().err
    assert ours.requests("POST", "/v1/files") == []


@pytest.mark.parametrize("case", ["reinforcement", "not downloadable", "refused here", "unknown job"])
def test_failures_print_an_error_message(
    servers: tuple[Script, Script], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    theirs, ours = servers
    error = {"message": "Not allowed.", "type": "x", "param": None, "code": "c"}
    job_id = "ftjob-1"
    if case == "reinforcement":
        job_id = "ftjob-2"
        theirs.on("GET", "/v1/fine_tuning/jobs/ftjob-2", {**JOB, "method": {"type": "reinforcement"}})
    elif case == "unknown job":
        job_id = "ftjob-3"
    elif case == "not downloadable":
        theirs.on("GET", "/v1/files/file-theirs/content", Reply(status=400, body={"error": error}))
    else:
        theirs.on("GET", "/v1/files/file-theirs/content", Reply(body=DATA))
        ours._replies["POST", "/v1/files"] = [Reply(status=400, body={"error": error})]

    assert from_openai.main([job_id, "--model", "smol"]) == 1

    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: ")
    assert ours.requests("POST", "/v1/fine_tuning/jobs") == []

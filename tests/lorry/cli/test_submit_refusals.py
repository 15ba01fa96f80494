"""`lorry jobs submit`: errors name the typed option, and rejected jobs leave no uploaded files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
Run = Callable[..., Result]


def error_reply(status: int, param: str | None, message: str = "No.") -> Reply:
    headers = {"x-should-retry": "false"}
    error = {"message": message, "type": "x", "param": param, "code": "c"}
    return Reply(status=status, body={"error": error}, headers=headers)


@pytest.mark.parametrize(
    ("typed", "param", "expected"),
    [
        ("", "lora.rank", "--rank"),
        ("", "lora.target_modules.0", "--target"),
        ("", "method.supervised.hyperparameters.n_epochs", "--epochs"),
        ("", "method.dpo.hyperparameters.neftune_alpha", "--neftune-alpha"),
        ("", "data.overflow", "--overflow"),
        ("", "metadata.team", "--metadata"),
        ("", "training_file", "TRAIN"),
        ("--set optimizer.beta1=3", "optimizer.beta1", "--set optimizer.beta1"),
        ("--set lora.rank=0", "lora.rank", "--set lora.rank"),
        ('--set lora={"rank":0}', "lora.rank", "--set lora"),
        ("--rank 0 --set lora.alpha=2", "lora.rank", "--rank"),
        ("--set lora.alpha=2", "lora", "--set lora.alpha"),
        ("--rank 0", "lora", "--rank"),
        ("--rank 0 --dora", "lora", "--rank, --dora"),
        ("--patience 3", "early_stopping", "--patience"),
        ("--seed 3", "Idempotency-Key", None),
        ("--seed 3", "lora", None),
        ("--seed 3", "adapter", None),
    ],
)
def test_error_names_every_typed_option_that_set_the_field(
    service: Script, submit: Run, typed: str, param: str, expected: str | None
) -> None:
    service.on("POST", JOBS, error_reply(400, param))

    result = submit("m", "file-9", *typed.split())

    place = f" (at {expected})" if expected else ""
    assert (result.exit_code, result.stderr) == (1, f"Error: No.{place}\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("m", "gone.jsonl"), "TRAIN"),
        (("m", "train.jsonl", "--valid", "gone.jsonl"), "--valid"),
        (("m", "train.jsonl", "--metadata", "team"), "KEY=VALUE"),
        (("m", "train.jsonl", "--set", "=3"), "PATH=VALUE"),
        (("m", "train.jsonl", "--schedule", "steep"), "--schedule"),
        (("m", "train.jsonl", "--loss", "all"), "--loss"),
        (("m", "train.jsonl", "--overflow", "wrap"), "--overflow"),
        (("m", "train.jsonl", "--lr", "fast"), "'--lr': that is not a number."),
        (("m", "train.jsonl", "--rank", "4.5"), "'--rank': that is not a whole number."),
        (("m", "train.jsonl", "--rank", "4", "--rank", "8"), "--rank was passed twice"),
        (("m", "train.jsonl", "--lr", "0.1", "--learning-rate", "0.2"), "--learning-rate was passed twice"),
        (("m", "train.jsonl", "--metadata", "a=b", "--metadata", "a=c"), "'a' was passed twice"),
        (("m", "train.jsonl", "--rank-pattern", "q=4", "--rank-pattern", "q=8"), "'q' was passed twice"),
    ],
)
def test_invalid_option_is_named_before_any_upload(
    service: Script, submit: Run, arguments: tuple[str, ...], expected: str
) -> None:
    result = submit(*arguments)

    assert result.exit_code == 2
    assert expected in result.stderr.splitlines()[-1]
    assert service.seen == []


@pytest.mark.parametrize(
    ("typed", "first", "second"),
    [
        (("--set", "lora.rank=8", "--rank", "16"), "--rank", "--set lora.rank"),
        (("--rank", "16", "--set", 'lora={"rank": 8}'), "--rank", "--set lora"),
        (("--set", "seed=1", "--set", "seed=2"), "--set seed", "--set seed"),
        (("--set", "lora.rank=8", "--set", "lora={}"), "--set lora.rank", "--set lora"),
        (("--metadata", "a=b", "--set", "metadata.a=c"), "--metadata", "--set metadata.a"),
        (("--set", "model=n"), "MODEL", "--set model"),
        (("--valid", "valid.jsonl", "--set", "validation_file=file-9"), "--valid", "--set validation_file"),
    ],
)
def test_field_set_by_two_options_is_rejected_with_both_names(
    service: Script, submit: Run, typed: tuple[str, ...], first: str, second: str
) -> None:
    result = submit("m", "train.jsonl", *typed)

    assert result.exit_code == 2
    assert f"{first} and {second} set the same field." in result.stderr
    assert service.seen == []


def deleted(service: Script) -> list[str]:
    return [request.path.removeprefix("/v1/files/") for request in service.seen if request.method == "DELETE"]


@pytest.mark.parametrize(("known", "exit_code"), [(True, 0), (False, 1)])
def test_key_that_cannot_read_models_submits_without_the_model_check(
    service: Script, run: Run, tmp_path: Path, known: bool, exit_code: int
) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    lacks = {"message": "The API key lacks the scope adapters:read.", "code": "missing_scope"}
    service.on("GET", "/v1/models/m", Reply(status=403, body={"error": lacks}))
    service.on("POST", "/v1/files", {"id": "file-1"})
    service.on("DELETE", "/v1/files/file-1", {})
    service.on("POST", JOBS, {"id": "ftjob-1"} if known else error_reply(404, "model"))

    result = run("jobs", "submit", "m", "train.jsonl")

    assert (result.exit_code, deleted(service)) == (exit_code, [] if known else ["file-1"])
    assert result.stdout == ("ftjob-1\n" if known else "")
    assert known or "No. (at MODEL)" in result.stderr


def test_key_rejected_for_another_reason_uploads_nothing(service: Script, run: Run, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    service.on("GET", "/v1/models/m", error_reply(403, None))

    result = run("jobs", "submit", "m", "train.jsonl")

    assert result.exit_code == 1
    assert not service.requests("POST", "/v1/files")


def test_uploads_of_a_rejected_job_are_deleted(service: Script, submit: Run) -> None:
    service.on("POST", JOBS, error_reply(404, "model"))
    service.on("DELETE", "/v1/files/file-1", {})
    service.on("DELETE", "/v1/files/file-2", error_reply(409, None, "In use."))

    result = submit("m", "train.jsonl", "--valid", "valid.jsonl")

    assert result.stderr.splitlines() == [
        "Deleted file file-1, which was uploaded for this job.",
        "File file-2 was uploaded for this job and could not be deleted: In use.",
        "Error: No. (at MODEL)",
    ]


def test_first_upload_is_deleted_if_the_second_is_rejected(
    service: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, submit: Run
) -> None:
    service.on("DELETE", "/v1/files/file-1", {})
    (tmp_path / "valid.jsonl").write_text("refused")

    def answer(request: Any, answer: Any = service.answer) -> Reply:
        return error_reply(400, "file") if b"refused" in request.body else answer(request)

    monkeypatch.setattr(service, "answer", answer)

    result = submit("m", "train.jsonl", "--valid", "valid.jsonl")

    assert result.stderr.splitlines()[-1] == "Error: No. (at --valid)"
    assert deleted(service) == ["file-1"]


def test_unknown_model_is_rejected_before_the_upload(service: Script, submit: Run) -> None:
    service.on("GET", "/v1/models/n", error_reply(404, "model", "There is no model 'n'. Base models here: m."))

    result = submit("n", "train.jsonl")

    assert (result.exit_code, result.stderr) == (1, "Error: There is no model 'n'. Base models here: m. (at MODEL)\n")
    assert [(request.method, request.path) for request in service.seen] == [("GET", "/v1/models/n")]


@pytest.mark.parametrize(
    ("typed", "param", "message", "expected"),
    [
        (
            ("--patience", "3"),
            "early_stopping",
            "early_stopping is about data. Set validation_file, or omit early_stopping.",
            "--patience is about data. Set --valid, or omit --patience.",
        ),
        (
            ("--decay", "0.2"),
            "schedule",
            "'schedule' is refused: no schedule has this field.",
            "--decay is refused: no schedule has this field.",
        ),
        (
            ("--beta", "0.1"),
            "method.supervised.hyperparameters.beta",
            "There is no field 'method.supervised.hyperparameters.beta'. Choose one in 'method.type'.",
            "There is no field --beta. Choose one in --method.",
        ),
        (("--rank", "1"), None, "The validation_file.", "The --valid."),
        (
            ("--set", "optimizer.beta1=3"),
            "optimizer.beta1",
            "'optimizer.beta1' must be less than 1. Correct optimizer.beta1.",
            "--set optimizer.beta1 must be less than 1. Correct --set optimizer.beta1.",
        ),
    ],
)
def test_error_message_uses_option_names_for_fields(
    service: Script, submit: Run, typed: tuple[str, ...], param: str | None, message: str, expected: str
) -> None:
    service.on("POST", JOBS, error_reply(400, param, message))

    assert submit("m", "file-9", *typed).stderr == f"Error: {expected}\n"


@pytest.mark.parametrize(
    ("file", "status", "param"),
    [("file-9", 400, "lora.rank"), ("train.jsonl", 500, None)],
    ids=["file passed by its id", "job that may have been created"],
)
def test_file_that_may_be_needed_is_not_deleted(
    service: Script, submit: Run, file: str, status: int, param: str | None
) -> None:
    service.on("POST", JOBS, error_reply(status, param))

    assert submit("m", file).exit_code == 1
    assert deleted(service) == []


def submit_again(service: Script, run: Run, folder: Path, **earlier: Any) -> tuple[str, str]:
    """Submit a file that the service already stores as file-1. Return the job's training file and stderr."""
    (folder / "train.jsonl").write_text("{}\n")
    service.on("GET", "/v1/models/m", {"id": "m", "state": "ready"})
    service.on("POST", "/v1/files", {"id": "file-2", "purpose": "fine-tune", "same_content_as": "file-1"})
    service.on("GET", "/v1/files/file-1", {"id": "file-1", "purpose": "fine-tune", **earlier})
    service.on("DELETE", "/v1/files/file-2", {})
    service.on("POST", JOBS, {"id": "ftjob-1"})
    result = run("jobs", "submit", "m", str(folder / "train.jsonl"))
    (sent,) = service.requests("POST", JOBS)
    return json.loads(sent.body)["training_file"], result.stderr


@pytest.mark.parametrize(
    ("earlier", "used", "superfluous"),
    [
        ({}, "file-1", "file-2"),
        ({"expires_at": 1790000000}, "file-2", None),
        ({"purpose": "user_data"}, "file-2", None),
    ],
)
def test_identical_file_is_reused_unless_it_expires_or_has_another_purpose(
    service: Script, run: Run, tmp_path: Path, earlier: dict[str, Any], used: str, superfluous: str | None
) -> None:
    training_file, message = submit_again(service, run, tmp_path, **earlier)

    assert (training_file, deleted(service)) == (used, [superfluous] if superfluous else [])
    assert ("train.jsonl is already uploaded as file-1; using that file." in message) == (used == "file-1")

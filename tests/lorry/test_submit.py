"""`lorry jobs submit`: every field can be said, refusals name what was typed, and leave no files behind."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import Result

from catalog.course_spec import EarlyStopping, EvaluationRequest, OptimizerRequest, ScheduleRequest
from catalog.data_spec import DataRequest
from catalog.methods import NUMBERS as METHOD_NUMBERS
from catalog.spec import JobRequest, LoraRequest
from lorry.cli.submit import FIELDS, NAMES, submit
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
JOB = {"id": "ftjob-1", "status": "queued"}
NUMBERS = "method.supervised.hyperparameters"
NO_OPTION = {
    "evaluation.samples",
    *(f"optimizer.{name}" for name in ("beta1", "beta2", "eps", "momentum", "max_grad_norm")),
    "early_stopping.min_delta",
    *(f"method.{method}.hyperparameters.learning_rate_multiplier" for method in METHOD_NUMBERS),
    "method.dpo.hyperparameters.loss_type",
}
"""Fields that few people set: by `--set`."""
Run = Callable[..., Result]


@pytest.fixture
def run(run: Run, service: Script, tmp_path: Path) -> Run:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "valid.jsonl").write_text("{}\n")
    service.on("GET", "/v1/models/m", {"id": "m", "state": "ready"})
    service.on("POST", "/v1/files", {"id": "file-1"}, {"id": "file-2"})
    return partial(run, "jobs", "submit")


def refusal(status: int, param: str | None, message: str = "No.") -> Reply:
    headers = {"x-should-retry": "false"}
    error = {"message": message, "type": "x", "param": param, "code": "c"}
    return Reply(status=status, body={"error": error}, headers=headers)


def sent(service: Script) -> dict[str, Any]:
    return json.loads(service.requests("POST", JOBS)[-1].body)


def leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    return (f"{prefix}.{name}" for name in model.model_fields)


def test_every_field_of_a_job_has_an_option_or_is_named_here() -> None:
    groups = {
        "lora": LoraRequest,
        "optimizer": OptimizerRequest,
        "schedule": ScheduleRequest,
        "evaluation": EvaluationRequest,
        "data": DataRequest,
        "early_stopping": EarlyStopping,
        **{f"method.{method}.hyperparameters": numbers for method, numbers in METHOD_NUMBERS.items()},
    }
    there_is_one_choice = {"method", "hyperparameters", "integrations"}
    fields = set(JobRequest.model_fields) - set(groups) - there_is_one_choice
    for prefix, model in groups.items():
        fields |= set(leaves(model, prefix))

    fields.add("method.type")
    of_some_methods = (".beta", ".gamma", ".label_smoothing", ".neftune_alpha")
    of_another_method = {name for name in set(NAMES) - fields if name.endswith(of_some_methods)}
    assert set(NAMES) - of_another_method == fields - NO_OPTION
    assert set(FIELDS) < set(inspect.signature(submit).parameters)


def test_a_methods_numbers_go_where_the_method_has_them(service: Script, run: Run) -> None:
    service.on("POST", JOBS, JOB)

    run("m", "train.jsonl", *["--method", "dpo", "--beta", "0.2", "--label-smoothing", "0.1"])
    dpo = JobRequest.model_validate(sent(service)).model_dump(exclude_unset=True)["method"]
    run("m", "train.jsonl", *["--method", "simpo", "--gamma", "0.5", "--batch-size", "2"])
    simpo = JobRequest.model_validate(sent(service)).model_dump(exclude_unset=True)["method"]

    assert dpo == {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "label_smoothing": 0.1}}}
    assert simpo == {"type": "simpo", "simpo": {"hyperparameters": {"gamma": 0.5, "batch_size": 2}}}


def test_a_target_may_be_all_linear_or_one_expression_and_a_pattern_needs_its_number(service: Script, run: Run) -> None:
    service.on("POST", JOBS, JOB)
    for given in ("all-linear", "re:.*q_proj"):
        run("m", "train.jsonl", "--target", given)
        assert sent(service)["lora"]["target_modules"] == given

    refused = run("m", "train.jsonl", "--rank-pattern", "q_proj")
    assert refused.exit_code == 2
    assert "KEY=NUMBER" in refused.stderr


def test_what_all_options_say_is_a_request_that_the_service_understands(service: Script, run: Run) -> None:
    service.on("POST", JOBS, JOB)
    flags = (
        "--valid valid.jsonl --rank 4 --alpha 8 --rslora --dropout 0 --target q_proj --learning-rate 0.001 "
        "--layer 0 --layer 3 --rank-pattern q_proj=8 --alpha-pattern (?=q).*=2.5 --dora --lora-plus-ratio 16 "
        "--precision float32 --quantization nf4 --seed 0 --evaluate-every 5 --checkpoint-every 7 --suffix s "
        "--priority batch --init pissa "
        "--schedule wsd --warmup 0 --weight-decay 0.1 --epochs 2 --max-steps 9 --batch-size 8 --max-length 128 "
        "--optimizer sgd --set optimizer.momentum=0.9 --decay 0.3 --keep last --patience 3 "
        "--set early_stopping.min_delta=0.5 --label-smoothing 0.1 --neftune-alpha 5 --loss last_turn --overflow drop "
        "--metadata team=a=b --metadata note= --set optimizer.beta1=0.9 --set optimizer.max_grad_norm=null "
        f"--set {NUMBERS}.learning_rate_multiplier=auto"
    )

    assert run("m", "train.jsonl", *flags.split()).stdout == "ftjob-1\n"

    assert JobRequest.model_validate(sent(service)).model_dump(exclude_unset=True) == {
        "model": "m",
        "training_file": "file-1",
        "validation_file": "file-2",
        "lora": {
            "rank": 4,
            "alpha": 8.0,
            "use_rslora": True,
            "dropout": 0.0,
            "target_modules": ["q_proj"],
            "layers_to_transform": [0, 3],
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {"(?=q).*": 2.5},
            "use_dora": True,
            "init_lora_weights": "pissa",
        },
        "optimizer": {
            "type": "sgd",
            "momentum": 0.9,
            "learning_rate": 0.001,
            "lora_plus_ratio": 16.0,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "max_grad_norm": None,
        },
        "schedule": {"type": "wsd", "warmup_ratio": 0.0, "decay_ratio": 0.3},
        "method": {
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 2,
                    "batch_size": 8,
                    "learning_rate_multiplier": "auto",
                    "label_smoothing": 0.1,
                    "neftune_alpha": 5.0,
                }
            }
        },
        "data": {"loss": "last_turn", "overflow": "drop"},
        "max_steps": 9,
        "max_length": 128,
        "precision": "float32",
        "quantisation": "nf4",
        "seed": 0,
        "evaluation": {"every_steps": 5, "keep": "last"},
        "early_stopping": {"patience": 3, "min_delta": 0.5},
        "checkpoint_every_steps": 7,
        "suffix": "s",
        "priority": "batch",
        "metadata": {"team": "a=b", "note": ""},
    }


def test_the_help_lays_options_out_in_groups(run: Run) -> None:
    lines = run("--help").stdout.splitlines()

    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Arguments:", "Adapter:", "Training:", "Evaluation and checkpoints:", "The job:", "Options:"]
    assert any(line.startswith("  --rank") for line in lines[lines.index("Adapter:") : lines.index("Training:")])


@pytest.mark.parametrize(
    ("param", "said"),
    [
        ("lora.rank", "--rank"),
        ("lora.target_modules.0", "--target"),
        (f"{NUMBERS}.n_epochs", "--epochs"),
        ("method.dpo.hyperparameters.neftune_alpha", "--neftune-alpha"),
        ("data.overflow", "--overflow"),
        ("metadata.team", "--metadata"),
        ("training_file", "TRAIN"),
        ("optimizer.beta1", "--set optimizer.beta1"),
        ("Idempotency-Key", "Idempotency-Key"),
    ],
)
def test_a_refusal_names_what_was_typed(service: Script, run: Run, param: str, said: str) -> None:
    service.on("POST", JOBS, refusal(400, param))

    result = run("m", "file-9", "--set", "optimizer.beta1=3")

    assert (result.exit_code, result.stderr) == (1, f"Error: No. (at {said})\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("m", "gone.jsonl"), "TRAIN"),
        (("m", "train.jsonl", "--valid", "gone.jsonl"), "--valid"),
        (("m", "train.jsonl", "--metadata", "team"), "KEY=VALUE"),
        (("m", "train.jsonl", "--set", "=3"), "PATH=VALUE"),
        (("m", "train.jsonl", "--schedule", "steep"), "--schedule"),
        (("m", "train.jsonl", "--loss", "all"), "--loss"),
        (("m", "train.jsonl", "--overflow", "wrap"), "--overflow"),
    ],
)
def test_what_can_not_be_sent_is_named_before_anything_is_uploaded(
    service: Script, run: Run, arguments: tuple[str, ...], said: str
) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
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
def test_a_field_that_is_said_twice_is_refused_with_both_names(
    service: Script, run: Run, typed: tuple[str, ...], first: str, second: str
) -> None:
    result = run("m", "train.jsonl", *typed)

    assert result.exit_code == 2
    assert f"{first} and {second} say the same field." in result.stderr
    assert service.seen == []


def test_the_learning_rate_has_a_short_name(service: Script, run: Run) -> None:
    service.on("POST", JOBS, JOB)

    assert run("m", "file-9", "--lr", "0.001").exit_code == 0
    assert sent(service)["optimizer"] == {"learning_rate": 0.001}


def test_fields_whose_names_begin_alike_are_two(service: Script, run: Run) -> None:
    service.on("POST", JOBS, JOB)

    result = run("m", "file-9", "--set", "lora.rank_more=1", "--rank", "8")

    assert result.exit_code == 0
    assert sent(service)["lora"] == {"rank": 8, "rank_more": 1}


def deleted(service: Script) -> list[str]:
    return [request.path.removeprefix("/v1/files/") for request in service.seen if request.method == "DELETE"]


def test_the_files_that_were_uploaded_for_a_refused_job_are_deleted_again(service: Script, run: Run) -> None:
    service.on("POST", JOBS, refusal(404, "model"))
    service.on("DELETE", "/v1/files/file-1", {})
    service.on("DELETE", "/v1/files/file-2", refusal(409, None, "In use."))

    result = run("m", "train.jsonl", "--valid", "valid.jsonl")

    assert result.stderr.splitlines() == [
        "file-1, uploaded for this job, is deleted again.",
        "file-2 was uploaded for this job and stays: In use.",
        "Error: No. (at MODEL)",
    ]


def test_the_first_file_is_deleted_again_where_the_second_is_refused(
    service: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
) -> None:
    service.on("DELETE", "/v1/files/file-1", {})
    (tmp_path / "valid.jsonl").write_text("refused")

    def answer(request: Any, answer: Any = service.answer) -> Reply:
        return refusal(400, "file") if b"refused" in request.body else answer(request)

    monkeypatch.setattr(service, "answer", answer)

    result = run("m", "train.jsonl", "--valid", "valid.jsonl")

    assert result.stderr.splitlines()[-1] == "Error: No. (at --valid)"
    assert deleted(service) == ["file-1"]


def test_a_misspelt_model_costs_no_upload(service: Script, run: Run) -> None:
    service.on("GET", "/v1/models/n", refusal(404, "model", "There is no model 'n'. Base models here: m."))

    result = run("n", "train.jsonl")

    assert (result.exit_code, result.stderr) == (1, "Error: There is no model 'n'. Base models here: m. (at MODEL)\n")
    assert [(request.method, request.path) for request in service.seen] == [("GET", "/v1/models/n")]


@pytest.mark.parametrize(
    ("typed", "param", "said"),
    [
        (("--set", "lora.rank=0"), "lora.rank", "--set lora.rank"),
        (("--set", 'lora={"rank": 0}'), "lora.rank", "--set lora"),
        (("--rank", "0", "--set", "lora.alpha=2"), "lora.rank", "--rank"),
        (("--set", "lora.alpha=2"), "lora", "--set lora.alpha"),
        (("--rank", "0"), "lora", "--rank"),
        (("--rank", "0", "--dora"), "lora", "--rank, --dora"),
        (("--patience", "3"), "early_stopping", "--patience"),
        (("--seed", "3"), "lora", "lora"),
    ],
)
def test_a_field_that_came_by_set_is_blamed_on_set(
    service: Script, run: Run, typed: tuple[str, ...], param: str, said: str
) -> None:
    service.on("POST", JOBS, refusal(400, param))

    assert run("m", "file-9", *typed).stderr == f"Error: No. (at {said})\n"


@pytest.mark.parametrize(
    ("typed", "param", "message", "said"),
    [
        (
            ("--patience", "3"),
            "early_stopping",
            "early_stopping is about data. Give a validation_file, or leave early_stopping out.",
            "--patience is about data. Give a --valid, or leave --patience out. (at --patience)",
        ),
        (
            ("--decay", "0.2"),
            "schedule",
            "'schedule' is refused: no schedule has it.",
            "--decay is refused: no schedule has it. (at --decay)",
        ),
        (
            ("--beta", "0.1"),
            "method.supervised.hyperparameters.beta",
            "There is no field 'method.supervised.hyperparameters.beta'. Choose one in 'method.type'.",
            "There is no field --beta. Choose one in --method. (at --beta)",
        ),
        (("--rank", "1"), None, "The validation_file.", "The --valid."),
    ],
)
def test_a_refusal_is_told_in_the_words_that_were_typed(
    service: Script, run: Run, typed: tuple[str, ...], param: str | None, message: str, said: str
) -> None:
    service.on("POST", JOBS, refusal(400, param, message))

    assert run("m", "file-9", *typed).stderr == f"Error: {said}\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--rank", "4", "--rank", "8"), "--rank is given 2 times"),
        (("--lr", "0.1", "--learning-rate", "0.2"), "--learning-rate is given 2 times"),
        (("--metadata", "a=b", "--metadata", "a=c"), "'a' is given twice"),
        (("--rank-pattern", "q=4", "--rank-pattern", "q=8"), "'q' is given twice"),
    ],
)
def test_an_option_or_a_key_that_is_given_twice_is_refused(
    service: Script, run: Run, typed: tuple[str, ...], said: str
) -> None:
    result = run("m", "train.jsonl", *typed)

    assert result.exit_code == 2
    assert said in result.stderr
    assert service.seen == []


def test_a_file_that_was_there_before_stays(service: Script, run: Run) -> None:
    service.on("POST", JOBS, refusal(400, "lora.rank"))

    assert run("m", "file-9").exit_code == 1
    assert deleted(service) == []


def test_files_stay_where_the_job_may_have_been_made(service: Script, run: Run) -> None:
    service.on("POST", JOBS, refusal(500, None))

    assert run("m", "train.jsonl").exit_code == 1
    assert deleted(service) == []

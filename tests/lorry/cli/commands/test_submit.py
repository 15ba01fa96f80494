"""`lorry jobs submit`: every field of a job can be set."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel
from typer.testing import Result

from catalog.spec.data import DataRequest
from catalog.spec.job import JobRequest, LoraRequest
from catalog.spec.methods import HYPERPARAMETERS
from catalog.spec.training import EarlyStopping, EvaluationRequest, OptimizerRequest, ScheduleRequest
from lorry.cli.commands.submit import FIELDS, NAMES
from lorry.cli.commands.submit import submit as submit_command
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
JOB = {"id": "ftjob-1", "status": "queued"}
NUMBERS = "method.supervised.hyperparameters"
NO_OPTION = {
    "evaluation.samples",
    "resources",
    *(f"optimizer.{name}" for name in ("beta1", "beta2", "eps", "momentum", "max_grad_norm")),
    *(f"optimizer.{name}" for name in ("beta2_decay", "clip_threshold", "scale_floor")),
    "early_stopping.min_delta",
    *(f"method.{method}.hyperparameters.learning_rate_multiplier" for method in HYPERPARAMETERS),
    "method.dpo.hyperparameters.loss_type",
    "method.kto.hyperparameters.desirable_weight",
    "method.kto.hyperparameters.undesirable_weight",
}
"""Rarely used fields. They have no option of their own; users set them with `--set`."""
EVERY_OPTION = (
    "--valid valid.jsonl --rank 4 --alpha 8 --rslora --dropout 0 --target q_proj --learning-rate 0.001 "
    "--layer 0 --layer 3 --rank-pattern q_proj=8 --alpha-pattern (?=q).*=2.5 --dora --lora-plus-ratio 16 "
    "--precision float32 --quantization nf4 --seed 0 --evaluate-every 5 --checkpoint-every 7 --suffix s "
    "--must-serve-on vllm --priority batch --deadline 2026-12-01T08:00+00:00 --init pissa --parent adapter-1 "
    "--schedule wsd --warmup 0 --weight-decay 0.1 --epochs 2 --max-steps 9 --batch-size 8 --max-length 128 "
    "--optimizer sgd --set optimizer.momentum=0.9 --decay 0.3 --keep last --patience 3 "
    "--set early_stopping.min_delta=0.5 --label-smoothing 0.1 --neftune-alpha 5 --loss last_turn --overflow drop "
    "--metadata team=a=b --metadata note= --set optimizer.beta1=0.9 --set optimizer.max_grad_norm=null "
    f"--set {NUMBERS}.learning_rate_multiplier=auto"
)
EXPECTED_REQUEST: dict[str, Any] = {
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
    "parent_adapter": "adapter-1",
    "data": {"loss": "last_turn", "overflow": "drop"},
    "max_steps": 9,
    "max_length": 128,
    "precision": "float32",
    "quantization": "nf4",
    "seed": 0,
    "evaluation": {"every_steps": 5, "keep": "last"},
    "early_stopping": {"patience": 3, "min_delta": 0.5},
    "checkpoint_every_steps": 7,
    "suffix": "s",
    "must_serve_on": "vllm",
    "priority": "batch",
    "deadline": 1_796_112_000,
    "metadata": {"team": "a=b", "note": ""},
}
Run = Callable[..., Result]


def sent(service: Script) -> dict[str, Any]:
    return json.loads(service.requests("POST", JOBS)[-1].body)


def leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    return (f"{prefix}.{name}" for name in model.model_fields)


def test_every_job_field_has_an_option_or_is_listed_as_an_exception() -> None:
    groups = {
        "lora": LoraRequest,
        "optimizer": OptimizerRequest,
        "schedule": ScheduleRequest,
        "evaluation": EvaluationRequest,
        "data": DataRequest,
        "early_stopping": EarlyStopping,
        **{f"method.{method}.hyperparameters": numbers for method, numbers in HYPERPARAMETERS.items()},
    }
    nested = {"method", "hyperparameters", "integrations"}
    fields = set(JobRequest.model_fields) - set(groups) - nested
    for prefix, model in groups.items():
        fields |= set(leaves(model, prefix))

    fields.add("method.type")
    method_specific = (".beta", ".gamma", ".label_smoothing", ".neftune_alpha")
    of_other_methods = {name for name in set(NAMES) - fields if name.endswith(method_specific)}
    assert set(NAMES) - of_other_methods == fields - NO_OPTION
    assert set(FIELDS) < set(inspect.signature(submit_command).parameters)


def test_hyperparameters_are_sent_under_their_method(service: Script, submit: Run) -> None:
    service.on("POST", JOBS, JOB)

    submit("m", "train.jsonl", *["--method", "dpo", "--beta", "0.2", "--label-smoothing", "0.1"])
    dpo = JobRequest.model_validate(sent(service)).model_dump(exclude_unset=True)["method"]
    submit("m", "train.jsonl", *["--method", "simpo", "--gamma", "0.5", "--batch-size", "2"])
    simpo = JobRequest.model_validate(sent(service)).model_dump(exclude_unset=True)["method"]

    assert dpo == {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "label_smoothing": 0.1}}}
    assert simpo == {"type": "simpo", "simpo": {"hyperparameters": {"gamma": 0.5, "batch_size": 2}}}


def test_target_accepts_a_keyword_or_regex_and_patterns_require_numbers(service: Script, submit: Run) -> None:
    service.on("POST", JOBS, JOB)
    for given in ("all-linear", "re:.*q_proj"):
        submit("m", "train.jsonl", "--target", given)
        assert sent(service)["lora"]["target_modules"] == given

    refused = submit("m", "train.jsonl", "--rank-pattern", "q_proj")
    assert refused.exit_code == 2
    assert "KEY=NUMBER" in refused.stderr


def test_all_options_form_a_valid_request(service: Script, submit: Run) -> None:
    service.on("POST", JOBS, JOB)

    assert submit("m", "train.jsonl", *EVERY_OPTION.split()).stdout == "ftjob-1\n"

    printed = JobRequest.model_validate(sent(service)).model_dump(exclude_unset=True)
    assert printed == EXPECTED_REQUEST


def test_help_groups_the_options(submit: Run) -> None:
    lines = submit("--help").stdout.splitlines()

    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Arguments:", "Adapter:", "Training:", "Evaluation and checkpoints:", "Job:", "Options:"]
    assert any(line.startswith("  --rank") for line in lines[lines.index("Adapter:") : lines.index("Training:")])


def test_job_id_is_printed_before_watching(service: Script, submit: Run) -> None:
    error = {"message": "The API key lacks the scope jobs:read.", "code": "missing_scope", "type": "x", "param": None}
    service.on("POST", JOBS, JOB)
    service.on("GET", f"{JOBS}/ftjob-1", Reply(body={"error": error}, status=403))
    service.on("GET", f"{JOBS}/ftjob-1/stream", Reply(body={"error": error}, status=403))

    result = submit("m", "file-9", "--watch")

    assert result.exit_code == 1
    first, second, *_ = result.stderr.splitlines()
    assert (first, "jobs:read" in second) == ("Created job ftjob-1.", True)


def test_learning_rate_has_a_short_option(service: Script, submit: Run) -> None:
    service.on("POST", JOBS, JOB)

    assert submit("m", "file-9", "--lr", "0.001").exit_code == 0
    assert sent(service)["optimizer"] == {"learning_rate": 0.001}


def test_fields_with_a_common_prefix_do_not_conflict(service: Script, submit: Run) -> None:
    service.on("POST", JOBS, JOB)

    result = submit("m", "file-9", "--set", "lora.rank_more=1", "--rank", "8")

    assert result.exit_code == 0
    assert sent(service)["lora"] == {"rank": 8, "rank_more": 1}

"""`lorry jobs submit`: every field of a job can be set."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from typer.testing import Result

from catalog.spec.job import JobRequest
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
JOB = {"id": "ftjob-1", "status": "queued"}
NUMBERS = "method.supervised.hyperparameters"
EVERY_OPTION = (
    "--valid valid.jsonl --rank 4 --alpha 8 --rslora --dropout 0 --target q_proj --learning-rate 0.001 "
    "--layer 0 --layer 3 --rank-pattern q_proj=8 --alpha-pattern (?=q).*=2.5 --dora --lora-plus-ratio 16 "
    "--precision float32 --quantization nf4 --seed 0 --evaluate-every 5 --checkpoint-every 7 --suffix s "
    "--must-serve-on vllm --priority batch --deadline 2026-12-01T08:00+00:00 --init pissa --parent adapter-1 "
    "--schedule wsd --warmup 0 --weight-decay 0.1 --epochs 2 --max-steps 9 --batch-size 8 --max-length 128 "
    "--optimizer sgd --momentum 0.9 --decay 0.3 --keep last --patience 3 "
    "--min-delta 0.5 --label-smoothing 0.1 --neftune-alpha 5 --loss last_turn --overflow drop "
    "--metadata team=a=b --metadata note= --beta1 0.9 --set optimizer.max_grad_norm=null "
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

"""Validation errors name the field, the expected and rejected values, and the probably intended field."""

from __future__ import annotations

import difflib
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.errors.validation import AGAIN, MAX_LISTED, MAX_PATH_CHARS
from tests.api.site import error_of
from tests.catalog.world import World

MULTIPLIER = "hyperparameters.learning_rate_multiplier"
LEAST = {"model": "smol", "training_file": "file-x"}


def refused(client: TestClient, body: Any) -> dict[str, Any]:
    response = client.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == 400, response.text
    return error_of(response)


@pytest.mark.parametrize(
    ("fields", "param", "fragment"),
    [
        ({"lora": {"rank": 0}}, "lora.rank", "at least 1; got 0"),
        ({"lora": {"rank": "big"}}, "lora.rank", 'a whole number; got "big"'),
        ({"optimizer": {"learning_rate": -1e-4}}, "optimizer.learning_rate", "greater than 0 or 'auto'"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "a whole number or 'auto'"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "many"}}}},
            "method.supervised.hyperparameters.n_epochs",
            "a whole number or 'auto'",
        ),
        ({"suffix": ""}, "suffix", "at least 1"),
        ({"suffix": "x" * 65}, "suffix", "at most 64"),
        ({"lora": {"alpha": 1e7}}, "lora.alpha", "at most 1000000 or"),
        ({"metadata": {"k": 1}}, "metadata.k", "a string"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16 pairs"),
        ({"lora": {"target_modules": ["a b"]}}, "lora.target_modules.0", "the name of a layer"),
        ({"evaluation": {"every_steps": 0}}, "evaluation.every_steps", "must be between 1 and"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0", "type 'wandb' requires 'wandb' with its 'project'"),
        ({"integrations": [{"type": "comet"}]}, "integrations.0.type", "'wandb', 'mlflow' or 'tensorboard'"),
        ({"method": {"type": "reinforced"}}, "method.type", "'supervised', 'dpo', 'orpo', 'simpo' or 'kto'"),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "multi"}}}},
            "method.type",
            "Reinforcement fine-tuning is not supported. Use a preference method",
        ),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "its type is 'dpo'"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}},
            "method.dpo.hyperparameters.beta",
            "greater",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"loss_type": "ipo", "label_smoothing": 0.1}}}},
            "method.dpo.hyperparameters",
            "ipo has no label_smoothing",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"label_smoothing": 0.5}}}},
            "method.supervised.hyperparameters.label_smoothing",
            "less than 0.5",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"neftune_alpha": -1}}}},
            "method.supervised.hyperparameters.neftune_alpha",
            "at least 0",
        ),
        ({"seed": -1}, "seed", "at least 0"),
        ({"lora": {"rank": "8"}}, "lora.rank", 'a whole number; got "8"'),
        ({"lora": {"rank": True}}, "lora.rank", "a whole number; got true"),
        ({"lora": {"rank": 8.5}}, "lora.rank", "a whole number"),
        ({"lora": {"use_rslora": "yes"}}, "lora.use_rslora", "true or false"),
        ({"lora": {"alpha": "16"}}, "lora.alpha", "a number or 'auto'"),
        ({"optimizer": {"beta1": True}}, "optimizer.beta1", "a number"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs", "a whole number or 'auto'"),
        ({"lora": {"init_lora_weights": "pisa"}}, "lora.init_lora_weights", "'gaussian', 'pissa', 'pissa_niter_N'"),
        ({"lora": {"target_modules": ["all-linear", "q"]}}, "lora.target_modules.0", "not allowed in a list"),
        ({"max_length": True}, "max_length", "a whole number or 'auto'"),
        ({"hyperparameters": {"learning_rate_multiplier": 5001}}, MULTIPLIER, "at most 5000 or 'auto'"),
        ({"priority": "now"}, "priority", "'urgent', 'normal' or 'batch'"),
    ],
)
def test_invalid_value_error_names_field_and_expected_value(
    client: TestClient, fields: dict[str, Any], param: str, fragment: str
) -> None:
    error = refused(client, {**LEAST, **fields})

    assert error["param"] == param
    assert error["code"] == "invalid_value"
    assert fragment in error["message"]


def test_integers_are_accepted_for_number_fields(client: TestClient, world: World) -> None:
    fields = {"lora": {"alpha": 16, "dropout": 0}, "hyperparameters": {"learning_rate_multiplier": 5000}}

    job = client.post("/v1/fine_tuning/jobs", json={**LEAST, **fields, "training_file": world.file_id}).json()

    assert (job["lora"]["alpha"], job["lora"]["dropout"], job["optimizer"]["learning_rate"]) == (16.0, 0.0, 1.0)


@pytest.mark.parametrize(("number", "rest"), [(6, "1 more problem was found."), (7, "2 more problems were found.")])
def test_problems_beyond_the_listed_ones_are_counted(client: TestClient, number: int, rest: str) -> None:
    error = refused(client, {**LEAST, **{f"unknown_{i}": 1 for i in range(number)}})

    assert f" {rest} " in error["message"]


@pytest.mark.parametrize("field", ["model", "training_file"])
def test_missing_field_is_named(client: TestClient, field: str) -> None:
    error = refused(client, {name: value for name, value in LEAST.items() if name != field})

    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("fields", "suggestion"),
    [
        ({"lora": {"rnk": 8}}, "lora.rank"),
        ({"trainingfile": "x"}, "training_file"),
        ({"rank": 8}, "lora.rank"),
        ({"learning_rate": 1e-4}, "optimizer.learning_rate"),
        ({"lr": 1e-4}, "optimizer.learning_rate"),
        ({"optimizer": {"lr": 1e-4}}, "optimizer.learning_rate"),
        ({"load_in_4bit": True}, 'quantization\' with the value "nf4"'),
        ({"quantisation": "nf4"}, "quantization"),
        ({"lora": {"r": 8}}, "lora.rank"),
        ({"n_epochs": 3}, "n_epochs"),
        ({"neftune_alpha": 5}, "method.supervised.hyperparameters.neftune_alpha"),
        ({"hyperparameters": {"label_smoothing": 0.1}}, "method.supervised.hyperparameters.label_smoothing"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"label_smoothin": 0.1}}}},
            "method.dpo.hyperparameters.label_smoothing",
        ),
    ],
)
def test_unknown_field_error_suggests_the_intended_field(
    client: TestClient, fields: dict[str, Any], suggestion: str
) -> None:
    error = refused(client, {**LEAST, **fields})

    assert error["code"] == "unknown_parameter"
    assert (
        f"Did you mean '{suggestion}" in error["message"] or suggestion in error["message"].partition("Did you mean")[2]
    )


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("functions", 'Use \'tools\', with {"type": "function", "function": ...} for each function.'),
        ("function_call", "Use 'tools', and 'tool_choice' with the value \"auto\" or \"none\"."),
    ],
)
def test_deprecated_parameter_error_names_its_successor(client: TestClient, field: str, remedy: str) -> None:
    message = {"role": "user", "content": "a"}
    sent = client.post("/v1/chat/completions", json={"model": "smol", "messages": [message], field: []})
    text = client.post("/v1/completions", json={"model": "smol", "prompt": "a", field: []})

    assert sent.status_code == 400
    assert sent.json()["error"]["message"] == f"Unknown field '{field}'. {remedy}"
    assert "tools" not in text.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"store": True}, "'store' must be false; got true. Lorry does not store answers."),
        (
            {"tool_choice": "required"},
            "'tool_choice' must be 'auto' or 'none'; got \"required\". Lorry does not force a model to call a tool.",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "'tool_choice' must be 'auto' or 'none'. Lorry does not force a model to call a tool.",
        ),
        (
            {"response_format": {"type": "json_object"}},
            "'response_format.type' must be 'text'; got \"json_object\". Lorry does not force a model to write JSON.",
        ),
    ],
)
def test_unsupported_value_error_says_what_to_do_instead(
    client: TestClient, fields: dict[str, Any], message: str
) -> None:
    body = {"model": "smol", "messages": [{"role": "user", "content": "a"}], **fields}

    sent = client.post("/v1/chat/completions", json=body)

    assert sent.status_code == 400
    assert sent.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("method", "name", "methods"),
    [
        ("dpo", "neftune_alpha", "supervised"),
        ("orpo", "label_smoothing", "supervised, dpo"),
        ("supervised", "beta", "dpo, orpo, simpo, kto"),
        ("dpo", "desirable_weight", "kto"),
        ("supervised", "gamma", "simpo"),
    ],
)
def test_hyperparameter_of_other_methods_error_names_those_methods(
    client: TestClient, method: str, name: str, methods: str
) -> None:
    error = refused(client, {**LEAST, "method": {"type": method, method: {"hyperparameters": {name: 0.1}}}})

    assert (error["param"], error["code"]) == (f"method.{method}.hyperparameters.{name}", "unknown_parameter")
    assert (
        error["remedy"]
        == f"It belongs to the methods {methods}: set 'method.type' to one of them, or remove the field."
    )


def test_one_error_reports_several_faults(client: TestClient) -> None:
    error = refused(client, {**LEAST, "lora": {"rank": 0, "rnk": 1}, "seed": "x"})

    assert "'lora.rank' must be at least 1" in error["message"]
    assert "Did you mean 'lora.rank'?" in error["message"]
    assert "'seed' must be a whole number" in error["message"]


def test_hyperparameters_in_two_places_are_rejected(client: TestClient) -> None:
    error = refused(client, {**LEAST, "hyperparameters": {}, "method": {"type": "supervised"}})

    assert "set hyperparameters only once" in error["message"]


def test_wrong_query_parameter_is_named(client: TestClient) -> None:
    response = client.get("/v1/fine_tuning/jobs", params={"limit": 0})

    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == "limit"
    assert "at least 1" in error["message"]


@pytest.mark.parametrize(
    ("path", "name", "fragment"),
    [
        ("/v1/fine_tuning/jobs?limt=2", "limt", "Did you mean 'limit'?"),
        (
            "/v1/fine_tuning/jobs?status=failed",
            "status",
            "This operation accepts 'after', 'limit', 'metadata[KEY]', 'tag'.",
        ),
        ("/v1/models?metadata[team]=search", "metadata[team]", "This operation accepts no query parameters."),
        ("/v1/fine_tuning/jobs?metadata[]=search", "metadata[]", "Did you mean 'metadata[KEY]'?"),
        ("/v1/adapters/adapter-1/files/a/b.bin?part=2", "part", "This operation accepts no query parameters."),
    ],
)
def test_unknown_query_parameter_is_rejected(client: TestClient, path: str, name: str, fragment: str) -> None:
    response = client.get(path)

    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unknown_parameter", name)
    assert fragment in error["message"]


def test_error_does_not_repeat_a_secret(anonymous: TestClient) -> None:
    response = anonymous.post("/v1/browser_session", json={"api_key": ""})

    assert response.status_code == 400
    assert "; got" not in error_of(response)["message"]


def test_body_with_100000_unknown_fields_is_answered(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    get_close_matches = difflib.get_close_matches

    def counted(word: str, *given: Any, **options: Any) -> list[str]:
        compared.append(word)
        return get_close_matches(word, *given, **options)

    monkeypatch.setattr("api.errors.validation.difflib.get_close_matches", counted)
    body = "{" + ",".join(f'"{number:x}":0' for number in range(100_000)) + "}"

    response = client.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})

    message = error_of(response)["message"]
    assert response.status_code == 400
    assert message.count("is missing") + message.count("Unknown field") == MAX_LISTED
    assert message.endswith(f" {100_000 + len(LEAST) - MAX_LISTED} more problems were found. {AGAIN}")
    assert len(compared) <= 2 * MAX_LISTED


def test_long_path_is_cut(client: TestClient) -> None:
    path = "lora." + "é" * 100_000

    error = refused(client, {**LEAST, "lora": {"é" * 100_000: 1}})

    assert error["code"] == "unknown_parameter"
    assert error["param"] == path[:MAX_PATH_CHARS]
    assert len(error["message"]) < 3000

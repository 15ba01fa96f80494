"""Job requests: accepted and rejected fields, and warnings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from catalog.errors import InvalidRequest, LorryError, NotFound
from catalog.registry import base_models
from catalog.tables.storage import File
from tests.catalog.world import World, request

STOPPED = "The import of base model 'new' on worker w1 was stopped because it used too much memory."
RETRY = "Look at the source; then add the same model again, which retries."


def test_model_that_is_importing_or_failed_is_rejected(world: World) -> None:
    base_models.add(world.db, name="new", kind="hub", source="org/new", revision=None)
    with pytest.raises(InvalidRequest, match="still being imported") as early:
        world.submit(model="new")

    world.fail_import("new", {"code": "unsupported_model", "message": "/srv/new is a snapshot.", "remedy": ""})
    with pytest.raises(InvalidRequest, match=r"failed: unsupported_model\.$") as failed:
        world.submit(model="new")

    assert (early.value.code, failed.value.code) == ("not_ready", "import_failed")


@pytest.mark.parametrize(
    ("message", "remedy", "shown", "advice"),
    [
        (
            "/srv/new is a snapshot.",
            "Add a language model.",
            "failed: /srv/new is a snapshot.",
            "Add a language model.",
        ),
        (STOPPED, "Add memory.", STOPPED, "Add memory."),
        ("It ended.", RETRY, "failed: It ended.", RETRY),
    ],
    ids=["reason", "model named once", "advice to retry once"],
)
def test_operator_sees_why_a_model_import_failed(
    world: World, message: str, remedy: str, shown: str, advice: str
) -> None:
    base_models.add(world.db, name="new", kind="hub", source="org/new", revision=None)
    world.fail_import("new", {"code": "import_failed", "message": message, "remedy": remedy})

    with pytest.raises(InvalidRequest) as failed:
        world.submit(model="new", caller=replace(world.caller, is_operator=True))

    assert failed.value.message.endswith(shown)
    assert failed.value.message.count("base model 'new'") == 1
    assert failed.value.remedy == f"{advice} Or choose another base model."


def test_failed_models_are_not_listed_and_importing_ones_are_marked(world: World) -> None:
    for name in ("broken", "coming"):
        base_models.add(world.db, name=name, kind="hub", source=f"org/{name}", revision=None)
    world.fail_import("broken", {"code": "unsupported_model", "message": "", "remedy": ""})

    with pytest.raises(NotFound) as refusal:
        world.submit(model="not a name")

    assert refusal.value.remedy == "Use one of the available base models: coming (importing), smol."


def test_unknown_model_can_be_added_under_the_name_of_openai(world: World) -> None:
    with pytest.raises(NotFound) as refusal:
        world.submit(model="gpt-4o-mini-2024-07-18")

    assert refusal.value.remedy == (
        "Use one of the available base models: smol. Or ask an operator to add one under this name: "
        "`lorry models add gpt-4o-mini-2024-07-18 SOURCE`."
    )


def with_rates(multiplier: float | str | None, rate: float | str | None) -> dict[str, Any]:
    return {
        **({"hyperparameters": {"learning_rate_multiplier": multiplier}} if multiplier is not None else {}),
        **({"optimizer": {"learning_rate": rate}} if rate is not None else {}),
    }


@pytest.mark.parametrize("at_the_top", [True, False])
def test_conflicting_learning_rates_are_rejected(world: World, at_the_top: bool) -> None:
    fields = with_rates(2.0, 1e-3)
    if not at_the_top:
        fields["method"] = {"type": "supervised", "supervised": {"hyperparameters": fields.pop("hyperparameters")}}

    with pytest.raises(InvalidRequest) as refusal:
        world.submit(**fields)

    assert (refusal.value.code, refusal.value.param) == ("conflicting_value", "optimizer.learning_rate")


@pytest.mark.parametrize(
    ("multiplier", "rate", "found"),
    [
        (None, None, (1.0, 2e-4)),
        (2.0, "auto", (2.0, 4e-4)),
        ("auto", 1e-3, (5.0, 1e-3)),
        (None, 1e-3, (5.0, 1e-3)),
        (5.0, 1e-3, (5.0, 1e-3)),
    ],
)
def test_learning_rate_and_multiplier_are_equivalent(
    world: World, multiplier: Any, rate: Any, found: tuple[float, float]
) -> None:
    spec = world.submit(**with_rates(multiplier, rate)).spec

    assert (spec["learning_rate_multiplier"], spec["optimizer"]["learning_rate"]) == pytest.approx(found)


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_sgd_and_adafactor_need_an_explicit_learning_rate(world: World, optimizer: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        world.submit(optimizer={"type": optimizer})
    assert (refusal.value.code, refusal.value.param) == ("conflicting_value", "optimizer.learning_rate")
    usual = {"sgd": "from 0.002 to 0.2", "adafactor": "from 0.1 to 1"}[optimizer]
    assert refusal.value.remedy == f"Set optimizer.learning_rate, typically to a value {usual}."
    assert world.submit(optimizer={"type": optimizer, "learning_rate": 0.1}).id

    spec = world.submit(optimizer={"type": "sgd", "momentum": 0.9}, hyperparameters={"learning_rate_multiplier": 500.0})
    assert spec.spec["optimizer"]["learning_rate"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"early_stopping": {"patience": 2}}, "early_stopping"),
        ({"evaluation": {"keep": "best"}}, "evaluation.keep"),
        ({"evaluation": {"every_steps": 5, "keep": "best"}}, "evaluation.keep"),
        ({"evaluation": {"every_steps": 5}}, "evaluation.every_steps"),
    ],
)
def test_options_that_use_validation_loss_need_a_validation_file(
    world: World, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        world.submit(**fields)
    assert (refusal.value.code, refusal.value.param) == ("missing_required_parameter", param)

    spec = world.submit(**fields, validation_file=world.file()).spec
    assert spec["evaluation"]["keep"] == ("last" if param == "evaluation.every_steps" else "best")


def _warnings(world: World, **fields: Any) -> list[str]:
    job = world.submit(**fields)
    reported = world.events(job.id)
    return [event.message for event in reported if event.level == "warn"]


def test_validation_rows_equal_to_training_rows_cause_a_warning(world: World) -> None:
    (warning,) = _warnings(world, validation_file=world.file_id)

    assert f"validation_file ({world.file_id}) and training_file ({world.file_id}) are the same file" in warning
    assert _warnings(world, validation_file=world.file()) == []


def test_max_length_beyond_the_model_causes_a_warning(world: World) -> None:
    longest = world.submit(max_length=100_000).spec["max_length"]

    (warning,) = _warnings(world, max_length=longest + 1)

    assert f"to {longest} tokens, the base model's maximum" in warning
    assert _warnings(world, max_length=longest) == []


DECIDED: list[dict[str, Any]] = [{"early_stopping": {"patience": 2}}, {"evaluation": {"keep": "best"}}]


def every(steps: int, fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"evaluation": fields.get("evaluation", {}) | {"every_steps": steps}}


@pytest.mark.parametrize("fields", DECIDED)
def test_evaluation_options_without_a_timely_evaluation_are_rejected(world: World, fields: dict[str, Any]) -> None:
    """100 rows in batches of 4 are 25 steps per epoch."""
    usual: dict[str, Any] = {
        "validation_file": world.file(),
        "hyperparameters": {"batch_size": 4, "n_epochs": 1},
    }

    ten: dict[str, Any] = {"max_steps": 10}
    for requested in (every(26, fields), every(11, fields) | ten):
        with pytest.raises(InvalidRequest, match="requires evaluations during training") as refusal:
            world.submit(**usual, **requested)
        assert (refusal.value.code, refusal.value.param) == ("conflicting_value", "evaluation.every_steps")

    for requested in (every(25, fields), every(10, fields) | ten, fields | ten):
        assert world.submit(**usual, **requested).id


@pytest.mark.parametrize("fields", DECIDED)
def test_split_texts_may_have_more_steps_than_rows(world: World, fields: dict[str, Any]) -> None:
    texts: dict[str, Any] = {"training_file": world.file(kind="text"), "validation_file": world.file(kind="text")}
    split: dict[str, Any] = texts | {"data": {"overflow": "split"}} | every(100_000, fields)

    assert world.submit(**split).id
    with pytest.raises(InvalidRequest, match="requires evaluations during training"):
        world.submit(**split, max_steps=99_999)


def test_evaluation_interval_beyond_the_last_step_causes_a_warning(world: World) -> None:
    held_out = world.file()

    (warning,) = _warnings(world, validation_file=held_out, max_steps=10, evaluation={"every_steps": 11})

    assert "every_steps is 11, but the job has at most 10 steps" in warning
    assert "only at the start and at the end" in warning
    assert _warnings(world, validation_file=held_out, max_steps=10, evaluation={"every_steps": 10}) == []


def test_expired_file_is_rejected_as_expired(world: World) -> None:
    with world.db.write() as session:
        session.get_one(File, world.file_id).expires_at = world.clock.now

    with pytest.raises(NotFound, match=f"^File '{world.file_id}' has expired") as refusal:
        world.submit()

    assert refusal.value.remedy == "Upload the file again, and use the new file's ID as training_file."


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_unusable_files_are_rejected_by_field(world: World, param: str) -> None:
    foreign = world.file(caller=world.stranger)
    results = world.file(purpose="fine-tune-results")
    empty = world.file(num_rows=0)

    codes: dict[str, str] = {}
    for name, file_id in {"foreign": foreign, "none": "file-0", "purpose": results, "empty": empty}.items():
        fields: dict[str, Any] = {param: file_id}
        with pytest.raises(LorryError) as refusal:
            world.submit(**fields)
        assert refusal.value.param == param
        codes[name] = refusal.value.code

    assert codes == {
        "foreign": "file_not_found",
        "none": "file_not_found",
        "purpose": "wrong_file_kind",
        "empty": "file_empty",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"lora": {"rank": 0}},
        {"optimizer": {"learning_rate": -1}},
        {"optimizer": {"momentum": 0.9}},
        {"optimizer": {"eps": 1e-46}},
        {"optimizer": {"eps": 1e39}},
        {"optimizer": {"type": "sgd", "beta1": 0.8}},
        {"optimizer": {"type": "adafactor", "learning_rate": 0.1, "momentum": 0.9}},
        {"optimizer": {"type": "sgd", "learning_rate": 0.1, "scale_floor": 0.1}},
        {"optimizer": {"beta2_decay": -0.5}},
        {"schedule": {"decay_ratio": 0.2}},
        {"schedule": {"type": "wsd", "warmup_ratio": 0.3, "decay_ratio": 0.8}},
        {"schedule": {"type": "wsd", "warmup_ratio": 0.9}},
        {"early_stopping": {}},
        {"early_stopping": {"patience": 0}},
        {"hyperparameters": {"n_epochs": "many"}},
        {"suffix": ""},
        {"suffix": "a" * 65},
        {"no_such_field": 1},
    ],
)
def test_out_of_range_fields_are_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(training_file="file-1", **fields)


@pytest.mark.parametrize(
    ("data", "kind", "code"),
    [
        ({"loss": "last_turn"}, "text", "wrong_file_kind"),
        ({"loss": "last_turn"}, "completion", "wrong_file_kind"),
        ({"overflow": "split"}, "completion", "wrong_file_kind"),
        ({"overflow": "split"}, "chat", "wrong_file_kind"),
    ],
)
@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_data_options_unsuited_to_the_file_kind_are_rejected(
    world: World, data: dict[str, str], kind: str, code: str, field: str
) -> None:
    suits = world.file(kind="chat" if "loss" in data else "text")
    unlike = world.file(kind=kind)

    with pytest.raises(InvalidRequest) as refusal:
        world.send(request(**{"training_file": suits, field: unlike}, data=data))

    assert (refusal.value.code, refusal.value.param) == (code, f"data.{next(iter(data))}")
    assert unlike in refusal.value.message
    assert world.submit(training_file=suits, validation_file=suits, data=data).spec["data"].items() >= data.items()


def test_sample_prompts_need_a_validation_file_and_are_bounded(world: World) -> None:
    samples = {"prompts": ["a"], "max_tokens": 8}

    with pytest.raises(InvalidRequest) as refusal:
        world.submit(evaluation={"samples": samples})

    assert (refusal.value.code, refusal.value.param) == ("missing_required_parameter", "evaluation.samples")
    job = world.submit(evaluation={"samples": samples}, validation_file=world.file())
    assert job.spec["evaluation"]["samples"] == samples
    for wrong in ({"prompts": []}, {"prompts": ["a"] * 9}, {"prompts": [" "]}, {"prompts": ["a"], "max_tokens": 129}):
        with pytest.raises(ValidationError):
            request(evaluation={"samples": wrong})


def test_only_integral_numbers_are_accepted_as_integers() -> None:
    requested = request(
        training_file="f", lora={"rank": 8.0, "alpha": 4, "layers_to_transform": [1.0]}, max_length=64.0
    )

    assert (requested.lora.rank, requested.lora.alpha, requested.lora.layers_to_transform, requested.max_length) == (
        8,
        4.0,
        [1],
        64,
    )
    assert isinstance(requested.lora.alpha, float)
    for rank in (8.5, "8", True, 1e300):
        with pytest.raises(ValidationError):
            request(training_file="f", lora={"rank": rank})

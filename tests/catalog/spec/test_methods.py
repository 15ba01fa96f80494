"""Training methods: resolved hyperparameters, and files of the wrong kind."""

from typing import Any

import pytest

from catalog.errors import InvalidRequest
from catalog.spec.job import JobSpec
from catalog.spec.methods import PreferenceOptions, SupervisedOptions
from tests.catalog.world import World, request


def method(name: str, **numbers: Any) -> dict[str, Any]:
    return {"type": name, name: {"hyperparameters": numbers}}


RESOLVED = [
    (method("dpo"), PreferenceOptions(beta=0.1)),
    (method("dpo", beta="auto", label_smoothing=0.2), PreferenceOptions(beta=0.1, label_smoothing=0.2)),
    (method("dpo", beta=1, loss_type="ipo"), PreferenceOptions(beta=1.0, loss_type="ipo")),
    (method("orpo", beta=0.3), PreferenceOptions(beta=0.3)),
    (method("simpo"), PreferenceOptions(beta=2.0, gamma=1.0)),
    (method("simpo", beta=3, gamma=0), PreferenceOptions(beta=3.0, gamma=0.0)),
    ({"type": "orpo"}, PreferenceOptions(beta=0.1)),
    (method("kto"), PreferenceOptions(beta=0.1)),
    (
        method("kto", beta=0.2, desirable_weight=1.3, undesirable_weight=0.5),
        PreferenceOptions(beta=0.2, desirable_weight=1.3, undesirable_weight=0.5),
    ),
    (method("supervised"), SupervisedOptions()),
]


@pytest.mark.parametrize(("requested", "expected"), RESOLVED)
def test_auto_hyperparameters_are_resolved(
    world: World, requested: dict[str, Any], expected: SupervisedOptions | PreferenceOptions
) -> None:
    kind = "chat" if requested["type"] == "supervised" else "unpaired" if requested["type"] == "kto" else "preference"

    spec = JobSpec.model_validate(world.submit(training_file=world.file(kind=kind), method=requested).spec)

    assert (spec.method, spec.method_options) == (requested["type"], expected)
    assert spec.optimizer.learning_rate == pytest.approx(2e-4 if kind == "chat" else 2e-5)


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ({}, SupervisedOptions()),
        ({"method": {"type": "supervised"}}, SupervisedOptions(label_smoothing=0.0, neftune_alpha=0.0)),
        ({"hyperparameters": {"n_epochs": 2}}, SupervisedOptions()),
        (
            {"method": method("supervised", label_smoothing=0.1, neftune_alpha=5)},
            SupervisedOptions(label_smoothing=0.1, neftune_alpha=5.0),
        ),
    ],
)
def test_supervised_hyperparameters_are_stored(
    world: World, requested: dict[str, Any], expected: SupervisedOptions
) -> None:
    spec = JobSpec.model_validate(world.submit(**requested).spec)

    assert spec.method_options == expected


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
@pytest.mark.parametrize(
    ("name", "fits", "other"),
    [
        ("dpo", "preference", "chat"),
        ("supervised", "text", "preference"),
        ("kto", "unpaired", "completion"),
        ("kto", "unpaired", "preference"),
        ("simpo", "preference", "unpaired"),
        ("supervised", "completion", "unpaired"),
    ],
)
def test_file_of_the_wrong_kind_is_rejected(world: World, param: str, name: str, fits: str, other: str) -> None:
    files: dict[str, Any] = {"training_file": world.file(kind=fits), "validation_file": world.file(kind=fits)}

    with pytest.raises(InvalidRequest) as caught:
        world.submit(**{**files, param: world.file(kind=other)}, method=method(name))

    assert (caught.value.code, caught.value.param) == ("wrong_file_kind", param)
    assert world.submit(**files, method=method(name)).id


@pytest.mark.parametrize(
    ("name", "kind", "remedy"),
    [
        (
            "kto",
            "completion",
            "Set method.type to 'supervised', or use a file of labeled answers, one on each line: {",
        ),
        (
            "supervised",
            "unpaired",
            "Set method.type to 'kto', or use a file of chats, prompts with completions, or plain text.",
        ),
        ("supervised", "preference", "Set method.type to 'dpo', 'orpo' or 'simpo', or use a file of chats"),
        ("dpo", "unpaired", "Set method.type to 'kto', or use a file of preference pairs, one on each line: "),
    ],
)
def test_remedy_names_a_fitting_method_and_a_fitting_file(world: World, name: str, kind: str, remedy: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        world.submit(training_file=world.file(kind=kind), method=method(name))

    assert caught.value.remedy.startswith(remedy)


def test_remedy_for_a_validation_file_keeps_the_method_of_the_training_file(world: World) -> None:
    with pytest.raises(InvalidRequest) as caught:
        world.submit(validation_file=world.file(kind="preference"))

    assert caught.value.remedy == "Set validation_file to a file of chats, prompts with completions, or plain text."


def test_kto_batch_of_one_is_rejected() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        request(method=method("kto", batch_size=1))

"""What a job learns by: numbers resolved, and files that don't fit it refused."""

from typing import Any

import pytest

from catalog.errors import InvalidRequest
from catalog.spec.job import JobSpec
from catalog.spec.methods import PreferenceSpec, SupervisedSpec
from tests.catalog.world import World, request


def method(name: str, **numbers: Any) -> dict[str, Any]:
    return {"type": name, name: {"hyperparameters": numbers}}


RESOLVED = [
    (method("dpo"), PreferenceSpec(beta=0.1)),
    (method("dpo", beta="auto", label_smoothing=0.2), PreferenceSpec(beta=0.1, label_smoothing=0.2)),
    (method("dpo", beta=1, loss_type="ipo"), PreferenceSpec(beta=1.0, loss_type="ipo")),
    (method("orpo", beta=0.3), PreferenceSpec(beta=0.3)),
    (method("simpo"), PreferenceSpec(beta=2.0, gamma=1.0)),
    (method("simpo", beta=3, gamma=0), PreferenceSpec(beta=3.0, gamma=0.0)),
    ({"type": "orpo"}, PreferenceSpec(beta=0.1)),
    (method("kto"), PreferenceSpec(beta=0.1)),
    (
        method("kto", beta=0.2, desirable_weight=1.3, undesirable_weight=0.5),
        PreferenceSpec(beta=0.2, desirable_weight=1.3, undesirable_weight=0.5),
    ),
    (method("supervised"), None),
]


@pytest.mark.parametrize(("asked", "expected"), RESOLVED)
def test_every_auto_of_a_method_becomes_a_number(world: World, asked: dict[str, Any], expected: PreferenceSpec) -> None:
    kind = "chat" if expected is None else "unpaired" if asked["type"] == "kto" else "preference"

    spec = JobSpec.model_validate(world.submit(training_file=world.file(kind=kind), method=asked).spec)

    assert (spec.method, spec.preference) == (asked["type"], expected)
    assert spec.optimizer.learning_rate == pytest.approx(2e-4 if expected is None else 2e-5)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, SupervisedSpec()),
        ({"method": {"type": "supervised"}}, SupervisedSpec(label_smoothing=0.0, neftune_alpha=0.0)),
        ({"hyperparameters": {"n_epochs": 2}}, SupervisedSpec()),
        (
            {"method": method("supervised", label_smoothing=0.1, neftune_alpha=5)},
            SupervisedSpec(label_smoothing=0.1, neftune_alpha=5.0),
        ),
    ],
)
def test_the_numbers_of_learning_from_answers_are_kept(
    world: World, asked: dict[str, Any], expected: SupervisedSpec
) -> None:
    spec = JobSpec.model_validate(world.submit(**asked).spec)

    assert (spec.supervised, spec.method_hyperparameters) == (expected, expected)


def test_pairs_have_no_numbers_of_learning_from_answers(world: World) -> None:
    asked = method("dpo", label_smoothing=0.2)

    spec = JobSpec.model_validate(world.submit(training_file=world.file(kind="preference"), method=asked).spec)

    assert spec.supervised is None
    assert spec.method_hyperparameters == PreferenceSpec(beta=0.1, label_smoothing=0.2)


def test_a_specs_record_from_before_there_was_a_choice_is_supervised(world: World) -> None:
    later = ("method", "preference", "supervised")
    record = {name: value for name, value in world.submit().spec.items() if name not in later}

    spec = JobSpec.model_validate(record)

    assert (spec.method, spec.preference, spec.method_hyperparameters) == ("supervised", None, SupervisedSpec())


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
def test_a_file_that_does_not_fit_the_method_is_refused(
    world: World, param: str, name: str, fits: str, other: str
) -> None:
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
            'Use method supervised, or a file of labeled answers, one per line: {"prompt": ..., "com',
        ),
        ("supervised", "unpaired", "Use method kto, or a file without pairs or labeled answers."),
        ("supervised", "preference", "Use method dpo, orpo or simpo, or a file without"),
        ("dpo", "unpaired", "Use method kto, or a file of pairs, one per line: "),
    ],
)
def test_the_remedy_names_the_method_that_reads_the_file_and_the_file_that_the_method_reads(
    world: World, name: str, kind: str, remedy: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        world.submit(training_file=world.file(kind=kind), method=method(name))

    assert caught.value.remedy.startswith(remedy)


def test_a_batch_of_one_labeled_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        request(method=method("kto", batch_size=1))


def test_a_file_of_before_kinds_were_kept_is_one_of_chats(world: World) -> None:
    old = world.file(kind=None)

    assert world.submit(training_file=old).id
    with pytest.raises(InvalidRequest, match="is a chat"):
        world.send(request(training_file=old, method=method("simpo")))

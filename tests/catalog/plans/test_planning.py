"""Plan rules without a database: warnings, serving compatibility, devices and time estimates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog.error_texts import ErrorText
from catalog.plans import duration
from catalog.plans.duration import ExpectedStart, Measured, Occupied, Overheads, Runner, TrainingWork
from catalog.resources import sharding
from catalog.resources.sharding import CARDS, MIB
from catalog.resources.throughput import Speeds
from catalog.serving import servability
from catalog.spec import job_warnings
from catalog.spec.job import MAX_LENGTH, JobSpec, ParentSpec, resolve
from catalog.spec.target_modules import Adapted, Linear
from tests.catalog.prepared_data import REPORT
from tests.catalog.world import request


def spec(**fields: Any) -> JobSpec:
    return resolve(request(training_file="f", **fields), num_rows=100, max_positions=512, seed=1)


def codes(found: Any) -> list[str]:
    return [caution.code for caution in found]


def test_few_steps_cause_a_warning_with_a_remedy() -> None:
    assert job_warnings.few_steps(spec(), 30) is None
    few = job_warnings.few_steps(spec(), 8)
    assert few is not None
    assert "8 optimizer steps" in few.sentence()
    assert "n_epochs to 12" in few.remedy, "3 epochs give 8 steps"
    assert job_warnings.few_steps(spec(max_steps=8), 8) == ErrorText(
        code="few_steps",
        message="The job has only 8 optimizer steps. Fewer than 30 rarely change a model noticeably.",
        remedy="Raise max_steps to 30 or more, or omit it. If the job then still has too few steps, raise n_epochs.",
    )
    hopeless = job_warnings.few_steps(spec(), 1)
    assert hopeless is not None
    assert "n_epochs to 90" in hopeless.remedy
    assert "epochs" not in (job_warnings.few_steps(spec(hyperparameters={"n_epochs": 50}), 1) or few).remedy


@pytest.mark.parametrize(
    ("fields", "usable_rows", "remedy"),
    [
        ({}, 1, "Lower batch_size, or add rows."),  # even 100 epochs have only 25 steps
        ({}, 2, "Set n_epochs to 59, lower batch_size, or add rows."),
        ({"max_steps": 8}, 100, "Raise max_steps to 30 or more, or omit it."),
        (
            {"max_steps": 8},
            16,
            "Raise max_steps to 30 or more, or omit it. Also set n_epochs to 8, lower batch_size, or add rows.",
        ),
        ({"hyperparameters": {"batch_size": 1}}, 2, "Set n_epochs to 15, or add rows."),
        ({"hyperparameters": {"batch_size": 1, "n_epochs": 100}, "max_steps": 29}, 29, "Raise max_steps to 30 or"),
    ],
)
def test_remedy_for_few_steps_leads_to_enough_steps(fields: dict[str, Any], usable_rows: int, remedy: str) -> None:
    found = spec(**fields)

    few = job_warnings.few_steps(found, found.num_steps(usable_rows), usable_rows=usable_rows)

    assert few is not None
    assert few.remedy.startswith(remedy)


def test_remedies_suit_the_job_and_its_rows() -> None:
    def remedy(found: dict[str, Any], **fields: Any) -> str:
        (caution,) = job_warnings.of_data(spec(**fields), REPORT | found, role="training")
        return caution.remedy

    kto: dict[str, Any] = {"method": {"type": "kto", "kto": {"hyperparameters": {"batch_size": 2}}}}
    assert remedy({"usable_rows": 1, "rows": 1}, **kto) == "Add rows."
    assert remedy({"usable_rows": 3, "rows": 3}) == "Lower batch_size to 1, or add rows."
    assert (
        remedy({"usable_rows": 24, "rows": 24}, hyperparameters={"batch_size": 32})
        == "Lower batch_size to about 3, or add rows."
    )
    assert "weight" in remedy({"empty_rows": 1})
    assert "weight" not in remedy({"empty_rows": 1, "kind": "completion"})
    assert "first token" in remedy({"empty_rows": 1, "kind": "text"})
    assert "Both answers" in remedy({"empty_rows": 1, "kind": "preference"})


@pytest.mark.parametrize(
    ("most_tokens", "longer", "later"),
    [
        (
            None,
            "Raise max_length (the longest row has 2,000 tokens), or shorten the rows.",
            "Raise max_length (now 512",
        ),
        (
            4096,
            "Raise max_length (the longest row has 2,000 tokens), or shorten the rows.",
            "Raise max_length (now 512",
        ),
        (
            1024,
            "Raise max_length to 1024, the maximum for this base model, and shorten longer",
            "Raise max_length (now",
        ),
        (512, "max_length can't be raised, because", "max_length is already the maximum (512 tokens). Shorten the"),
    ],
)
def test_remedy_for_long_rows_does_not_raise_max_length_above_its_maximum(
    most_tokens: int | None, longer: str, later: str
) -> None:
    report = REPORT | {"truncated_rows": 9, "empty_rows": 9, "longest_row": 2000}

    cut, empty = job_warnings.of_data(spec(max_length=512), report, role="training", most_tokens=most_tokens)

    assert cut.remedy.startswith(longer)
    assert empty.remedy.startswith(later)
    assert ("choose a base model with a longer context" in cut.remedy) == (most_tokens == 512)


def test_longer_context_is_not_advised_at_the_maximum_of_all_models() -> None:
    found = spec().model_copy(update={"max_length": MAX_LENGTH})

    (cut,) = job_warnings.of_data(found, REPORT | {"truncated_rows": 9, "longest_row": 200_000}, role="training")

    assert cut.remedy.endswith("Shorten the rows (the longest has 200,000 tokens).")


def test_few_validation_tokens_are_not_said_to_be_trained_on() -> None:
    (caution,) = job_warnings.of_data(spec(), REPORT | {"supervised_tokens": 1}, role="validation")

    assert "in the validation file (0.0%) count toward the loss, so" in caution.message
    assert "trained on" not in caution.sentence()


def test_rank_of_a_parent_adapter_is_lowered_without_the_parent() -> None:
    parent = ParentSpec(adapter="adapter-1", name="ft:one", artifact="a", lineage="l")
    child = spec(lora={"rank": 64}).model_copy(update={"parent": parent})

    (caution,) = job_warnings.of_rank(child, [], num_parameters=10_000, supervised_tokens=1)

    assert caution.message.endswith("only 1 tokens.")
    assert caution.remedy == "To use a lower rank, train without parent adapter 'ft:one'."


def test_warning_about_the_rank_covers_all_layers() -> None:
    key, value = (Adapted(linear=Linear(path=f"a.{name}", out_features=8, in_features=64), rank=16) for name in "kv")
    narrower = replace(value, linear=replace(value.linear, out_features=4))
    of_pattern = replace(value, rank=32)
    counts = {"num_parameters": 10_000, "supervised_tokens": 1000}

    def warned(*layers: Adapted) -> ErrorText:
        (caution,) = job_warnings.of_rank(spec(), list(layers), **counts)
        return caution

    assert warned(key).remedy == "Lower the rank of a.k to 8 or less, in lora.rank or lora.rank_pattern."
    assert warned(key, key).message.endswith("This also applies to 1 other layer (k).")
    assert warned(key, narrower, key).message.endswith("This also applies to 2 other layers (k, v).")
    assert warned(key, narrower).remedy == (
        "Lower lora.rank to 4 or less, or set lower ranks for k and v in lora.rank_pattern."
    )
    assert warned(key, of_pattern).remedy == "Set the ranks of k and v to 8 or less in lora.rank_pattern."


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({}, False),
        ({"optimizer": {"learning_rate": 1.0}}, True),
        ({"optimizer": {"learning_rate": 2e-3}}, False),
        ({"optimizer": {"learning_rate": 1e-5}}, True),
        ({"method": {"type": "dpo"}}, False),
        ({"method": {"type": "dpo"}, "optimizer": {"learning_rate": 1e-3}}, True),
        ({"optimizer": {"type": "sgd", "learning_rate": 1.0}}, False),
        ({"optimizer": {"type": "adafactor", "learning_rate": 0.01}}, True),
        ({"optimizer": {"type": "adafactor", "learning_rate": 0.5}}, False),
    ],
)
def test_unusual_learning_rate_causes_a_warning(fields: dict[str, Any], warned: bool) -> None:
    found = codes(job_warnings.of_course(spec(**fields), num_steps=100, has_held_out=True))

    assert found == (["unusual_learning_rate"] if warned else [])


def test_missing_validation_file_causes_a_warning() -> None:
    assert codes(job_warnings.of_course(spec(), num_steps=100, has_held_out=False)) == ["no_validation_file"]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({}, None),
        ({"usable_rows": 3, "rows": 3}, "batch_exceeds_data"),
        ({"supervised_tokens": 200}, "low_trained_fraction"),
        ({"truncated_rows": 5}, "rows_too_long"),
        ({"truncated_rows": 4}, None),
        ({"dropped_rows": 6}, "rows_too_long"),
        ({"empty_rows": 1}, "empty_rows"),
        ({"duplicate_rows": 1}, "duplicate_rows"),
        ({"rows": 1000, "duplicate_rows": 9}, None),
    ],
)
def test_data_problems_cause_warnings(found: dict[str, int], code: str | None) -> None:
    assert codes(job_warnings.of_data(spec(), REPORT | found, role="training")) == ([code] if code else [])


def test_rows_in_both_files_cause_a_warning() -> None:
    assert job_warnings.of_overlap(0, of_rows=10) is None
    assert "1 of 10 rows" in str(job_warnings.of_overlap(1, of_rows=10))


def test_rank_above_layer_size_or_data_causes_a_warning() -> None:
    narrow = [Adapted(linear=Linear(path="a.b", out_features=8, in_features=64), rank=16)]
    counts = {"num_parameters": 10_000, "supervised_tokens": 100}

    assert codes(job_warnings.of_rank(spec(), narrow, **counts)) == ["rank_above_layer"]
    assert codes(job_warnings.of_rank(spec(lora={"rank": 64}), [], **counts)) == ["rank_above_layer"]
    assert codes(job_warnings.of_rank(spec(lora={"rank": 64}), [], num_parameters=10_000, supervised_tokens=1000)) == []


@pytest.mark.parametrize(
    ("fields", "ranks", "vllm", "merge"),
    [
        ({}, (16,), "yes", "yes"),
        ({"lora": {"use_rslora": True}}, (16,), "yes", "yes"),
        ({"lora": {"layers_to_transform": [0]}}, (16,), "yes", "yes"),
        ({"lora": {"rank": 32}}, (32,), "with_settings", "yes"),
        ({"lora": {"init_lora_weights": "pissa"}}, (16,), "with_settings", "yes"),
        ({"lora": {"rank": 256, "init_lora_weights": "olora"}}, (256,), "with_settings", "yes"),
        ({"lora": {"use_dora": True}}, (16,), "no", "yes"),
        ({"lora": {"rank_pattern": {"q_proj": 8}}}, (8, 16), "no", "yes"),
        ({"lora": {"alpha_pattern": {"q_proj": 8.0}}}, (16,), "no", "yes"),
        ({"quantization": "nf4"}, (16,), "with_settings", "with_settings"),
        ({"quantization": "int8"}, (16,), "with_settings", "with_settings"),
        ({"precision": "float32"}, (16,), "yes", "yes"),
    ],
)
def test_serving_compatibility_follows_from_shape_and_base(
    fields: dict[str, Any], ranks: tuple[int, ...], vllm: str, merge: str
) -> None:
    found = servability.of_job(spec(**fields), ranks)

    assert (found["vllm"].verdict, found["merge"].verdict) == (vllm, merge)
    assert all(answer.reasons for answer in found.values())


def test_vllm_reason_names_the_required_max_lora_rank() -> None:
    assert "--max-lora-rank 128" in " ".join(servability.of_job(spec(lora={"rank": 100}), [100])["vllm"].reasons)
    assert "--max-lora-rank 64" in " ".join(
        servability.of_job(spec(lora={"rank": 32, "init_lora_weights": "pissa"}), [32])["vllm"].reasons
    ), "a PiSSA adapter is exported with twice the rank"


def test_smallest_gpu_is_the_first_that_fits() -> None:
    sizes = [card.memory_bytes for card in CARDS]
    assert sizes == sorted(sizes)
    assert (sharding.smallest_card(15_000 * MIB) or CARDS[0]).gigabytes == 16
    assert (sharding.smallest_card(16_000 * MIB) or CARDS[0]).gigabytes == 24
    assert sharding.smallest_card(10**13) is None


WORK = TrainingWork(num_steps=10, tokens_per_step=100.0, valid_tokens=0, num_evaluations=0, num_parameters=10**9)
SPEEDS = Speeds(alone=((100.0, 50.0), (200.0, 80.0)))


def runner(worker_id: str = "w", device: str = "CPU, 2 cores", **given: Any) -> Runner:
    kind = "cpu" if device.startswith("CPU") else "cuda"
    given = {"overheads": Overheads(load_seconds=0.0, finish_seconds=0.0), **given}
    return Runner(worker_id=worker_id, device=device, kind=kind, num_cores=2 if kind == "cpu" else None, **given)


def measured(num_parameters: int = 10**9) -> Measured:
    return Measured(worker_id="w", base_name="other", num_parameters=num_parameters, speeds=SPEEDS)


@pytest.mark.parametrize(
    ("found", "kind", "seconds"),
    [
        (runner(same=measured()), "measured", 20.0),
        (runner(other=measured(2 * 10**9)), "scaled", 10.0),
        (runner(), "guess", 10.0),
        (runner(device="NVIDIA H100 80GB HBM3"), "guess", 4e12 / (0.3 * 989e12)),
        (runner(device="Some GPU"), "none", None),
    ],
)
def test_training_time_comes_with_its_basis(found: Runner, kind: str, seconds: float | None) -> None:
    estimate = duration.training_time(WORK, [found])

    assert estimate.basis_kind == kind
    assert estimate.seconds == (seconds and pytest.approx(seconds))
    assert estimate.basis


@pytest.mark.parametrize(
    ("overheads", "seconds", "stated"),
    [
        (Overheads(load_seconds=7.0, finish_seconds=3.0), 30.0, ("7 s (measured)", "3 s (measured)")),
        (Overheads(load_seconds=0.0, finish_seconds=None), 32.0, ("0 s (measured)", "12 s (a guess)")),
        (Overheads(), 44.0, ("12 s (a guess) for loading", "12 s (a guess) for verification")),
    ],
)
def test_training_time_includes_load_and_verification(
    overheads: Overheads, seconds: float, stated: tuple[str, str]
) -> None:
    estimate = duration.training_time(WORK, [runner(same=measured(), overheads=overheads)])

    assert estimate.seconds == pytest.approx(seconds)
    assert all(part in estimate.basis for part in stated)


def test_each_part_of_the_time_has_the_range_of_its_own_basis() -> None:
    overheads = Overheads(load_seconds=5.0, finish_seconds=None)

    estimate = duration.training_time(WORK, [runner(same=measured(), overheads=overheads)])

    assert estimate.seconds == pytest.approx(5 + 20 + 12)
    assert estimate.min_seconds == pytest.approx(0.8 * (5 + 20) + 0.3 * 12)
    assert estimate.max_seconds == pytest.approx(1.5 * (5 + 20) + 5 * 12)


def test_range_is_wider_the_weaker_its_basis_is() -> None:
    found = [runner(same=measured()), runner(other=measured()), runner()]

    estimates = [duration.training_time(WORK, [one]) for one in found]

    widths = [(one.max_seconds or 0) / (one.min_seconds or 1) for one in estimates]
    assert widths == sorted(widths)
    assert all((one.min_seconds or 0) < (one.seconds or 0) < (one.max_seconds or 0) for one in estimates)


def test_guessed_time_states_its_uncertainty() -> None:
    assert "training may take several times as long" in duration.training_time(WORK, [runner()]).basis


def test_measured_speed_is_preferred_to_a_faster_guess() -> None:
    fast = runner("fast", device="NVIDIA H200")

    assert duration.training_time(WORK, [fast, runner("slow", same=measured())]).worker_id == "slow"
    assert duration.training_time(WORK, []).seconds is None


def test_evaluations_and_dpo_reference_add_to_the_training_time() -> None:
    given = {"num_steps": 100, "tokens": 5000, "usable_rows": 100, "num_parameters": 1}
    plain = duration.work_of(spec(), valid_tokens=None, **given)
    assert plain.tokens == 100 * 4 * 50
    held_out = duration.work_of(spec(), valid_tokens=1000, **given)
    assert held_out.tokens == plain.tokens + 11 * 1000 / 2
    assert duration.work_of(spec(method={"type": "dpo"}), valid_tokens=None, **given).tokens == 1.5 * plain.tokens
    every = duration.work_of(spec(validation_file="v", evaluation={"every_steps": 50}), valid_tokens=1000, **given)
    assert every.num_evaluations == 3


def occupied(*left: float | None, takes_it_now: bool = False) -> Occupied:
    return Occupied(worker_id="w", seconds_left=left, takes_it_now=takes_it_now)


@pytest.mark.parametrize(
    ("fitting", "ahead", "typical", "seconds"),
    [
        ([], 0, 10.0, None),
        ([occupied()], 0, None, 0.0),
        ([occupied(50.0, takes_it_now=True)], 0, None, 0.0),
        ([occupied(50.0, 20.0)], 0, 10.0, 50.0),
        ([occupied(50.0)], 1, 10.0, 60.0),
        ([occupied(50.0), occupied()], 1, 10.0, 10.0),
        ([occupied(50.0), occupied()], 1, None, None),
        ([occupied(None)], 0, None, None),
        ([occupied(None)], 0, 10.0, 10.0),
    ],
)
def test_expected_start_depends_on_running_and_waiting_jobs(
    fitting: list[Occupied], ahead: int, typical: float | None, seconds: float | None
) -> None:
    place = ExpectedStart(ahead=ahead, typical_seconds=typical, num_typical=3, fitting=tuple(fitting), num_live=1)

    estimate = duration.expected_start(place)

    assert estimate.seconds == seconds
    assert estimate.basis

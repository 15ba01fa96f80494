"""Warns about a job before any training: each warning has a code, a message and a remedy. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from catalog.error_texts import ErrorText
from catalog.spec.job import MAX_LENGTH, JobSpec
from catalog.spec.methods import PREFERENCE_MULTIPLIER
from catalog.spec.target_modules import Adapted, above_limit, lowest_limit, names_of, other_layers
from catalog.spec.training import BASE_LEARNING_RATE

FEW_STEPS = 30
"""With fewer optimizer steps, the learning rate decays right after warm-up, and the adapter barely changes."""
MOST_EPOCHS = 100
"""Maximum of `n_epochs`."""
UNUSUAL_RATE = 10.0
"""Factor above or below the usual learning rate."""
LOWEST_ADAFACTOR = 0.05
"""Below this learning rate, a B that starts at zero barely changes; see docs/reference/job-fields.md."""
LOW_TRAINED_FRACTION = 0.05
"""Fraction of a file's tokens that are trained on."""
MUCH_CUT = 0.05
"""Fraction of a file's rows that are too long."""
MANY_DUPLICATES = 0.01
"""Fraction of a file's rows that equal an earlier row."""
USUAL_RANK = 16
PARAMETERS_PER_TOKEN = 20
"""An adapter parameter stores about two bits, and a token of an answer contains about one (LoRA Without Regret,
Thinking Machines 2025). With this many parameters per trained token, the rank is far from being a limit."""
Report = Mapping[str, Any]


EMPTY_BECAUSE = {
    "chat": "Answers that start beyond this length are ignored. To include answers with weight 0, omit 'weight'.",
    "preference": "Both answers must start, and differ, within this length.",
    "completion": "Answers that start beyond this length are ignored.",
}
"""Why rows of each kind may have no trainable tokens."""


def few_steps(spec: JobSpec, num_steps: int, *, usable_rows: int | None = None) -> ErrorText | None:
    """Return a warning if the job has few steps. `num_steps`: the final number, once the files are prepared.

    `usable_rows`: of the training file; None if unknown.
    """
    if num_steps >= FEW_STEPS:
        return None
    advice = _more_steps(spec, num_steps, usable_rows)
    if num_steps == 1:
        return ErrorText.of("one_step", few=FEW_STEPS, advice=advice)
    return ErrorText.of("few_steps", num_steps=num_steps, few=FEW_STEPS, advice=advice)


def of_course(
    spec: JobSpec, *, num_steps: int, has_held_out: bool, usable_rows: int | None = None
) -> Iterator[ErrorText]:
    """Yield the warnings that do not depend on the rows, except on their number."""
    if (few := few_steps(spec, num_steps, usable_rows=usable_rows)) is not None:
        yield few
    yield from _rate(spec)
    if not has_held_out:
        yield ErrorText.of("no_validation_file")


def of_data(spec: JobSpec, report: Report, *, role: str, most_tokens: int | None = None) -> Iterator[ErrorText]:
    """Yield the warnings about a file. `role`: training or validation. `report`: DatasetReport of a usable file.

    `most_tokens`: the maximum of max_length for the base model; None if unknown.
    """
    rows, usable, tokens = int(report["rows"]), int(report["usable_rows"]), int(report["tokens"])
    trained = int(report["supervised_tokens"])
    if role == "training" and spec.batch_size > usable:
        lower = max(_smallest_batch(spec), usable // 8)
        name = "batch_exceeds_data_much"
        if lower >= spec.batch_size:
            name = "batch_exceeds_little_data"
        elif lower == _smallest_batch(spec):
            name = "batch_exceeds_data"
        yield ErrorText.of(name, batch_size=spec.batch_size, usable=usable, lower=lower)
    if tokens and trained < LOW_TRAINED_FRACTION * tokens:
        yield ErrorText.of(
            "low_trained_fraction",
            trained=trained,
            tokens=tokens,
            role=role,
            fraction=trained / tokens,
        )
    yield from _cut(spec, report, rows=rows, role=role, most_tokens=most_tokens)
    yield from _empty(spec, report, role=role, most_tokens=most_tokens)
    duplicates = int(report["duplicate_rows"])
    if duplicates and duplicates >= MANY_DUPLICATES * rows:
        yield ErrorText.of("duplicate_rows", num_rows=duplicates, fraction=duplicates / rows, role=role)


def of_overlap(num_rows: int, *, of_rows: int) -> ErrorText | None:
    """Return a warning if validation rows are trained on.

    `num_rows`: rows of the validation file that are also in the training file. `of_rows`: all rows of the validation
    file.
    """
    if not num_rows:
        return None
    return ErrorText.of("overlap", num_rows=num_rows, of_rows=of_rows)


def of_rank(
    spec: JobSpec, targets: list[Adapted], *, num_parameters: int, supervised_tokens: int
) -> Iterator[ErrorText]:
    """Yield the warnings about the rank. `supervised_tokens`: trained tokens in one epoch."""
    above = above_limit(targets)
    if above:
        linear = above[0].linear
        name = "ranks_above_layers"
        if spec.parent is not None:
            name = "parent_rank_above_layer"
        elif len(above) == 1:
            name = "rank_above_layer"
        elif any(layer.rank != spec.lora.rank for layer in above):
            name = "pattern_ranks_above_layers"
        yield ErrorText.of(
            name,
            rank=above[0].rank,
            path=linear.path,
            out_features=linear.out_features,
            in_features=linear.in_features,
            also=other_layers(above),
            lowest=lowest_limit(above),
            names=names_of(above),
            parent=spec.parent.name if spec.parent else "",
        )
    if spec.lora.rank > USUAL_RANK and num_parameters > PARAMETERS_PER_TOKEN * supervised_tokens:
        yield ErrorText.of(
            "rank_beyond_need" if spec.parent is None else "parent_rank_beyond_need",
            rank=spec.lora.rank,
            num_parameters=num_parameters,
            num_tokens=supervised_tokens,
            usual_rank=USUAL_RANK,
            parent=spec.parent.name if spec.parent else "",
        )


def _smallest_batch(spec: JobSpec) -> int:
    return 2 if spec.method == "kto" else 1


def _more_steps(spec: JobSpec, num_steps: int, usable_rows: int | None) -> str:
    ways = f"{_more_epochs(spec, num_steps, usable_rows)}add rows."
    if spec.max_steps is None or spec.max_steps >= FEW_STEPS:
        return f"{ways[0].upper()}{ways[1:]}"
    raised = f"Raise max_steps to {FEW_STEPS} or more, or omit it."
    if usable_rows is None and num_steps >= spec.max_steps:
        return f"{raised} If the job then still has too few steps, raise n_epochs."
    if usable_rows is not None and spec.n_epochs * usable_rows > (FEW_STEPS - 1) * spec.batch_size:
        return raised
    return f"{raised} Also {ways}"


def _more_epochs(spec: JobSpec, num_steps: int, usable_rows: int | None) -> str:
    """Return the ways to more steps with the same rows, as the start of a list; empty if there is none."""
    n_epochs = math.ceil(spec.n_epochs * FEW_STEPS / num_steps)
    if usable_rows:
        n_epochs = (FEW_STEPS - 1) * spec.batch_size // usable_rows + 1
    ways = [f"set n_epochs to {n_epochs}"] if n_epochs <= MOST_EPOCHS else []
    ways += ["lower batch_size"] if spec.batch_size > _smallest_batch(spec) else []
    return f"{', '.join(ways)}, or " if ways else ""


def _rate(spec: JobSpec) -> Iterator[ErrorText]:
    """Yield a warning if the learning rate is unusual. SGD has no usual learning rate."""
    rate, kind = spec.optimizer.learning_rate, spec.optimizer.type
    if kind == "adafactor" and rate < LOWEST_ADAFACTOR:
        yield ErrorText.of("adafactor_rate_low", rate=rate)
    if kind != "adamw":
        return
    usual = BASE_LEARNING_RATE * (1.0 if spec.method == "supervised" else PREFERENCE_MULTIPLIER)
    if usual / UNUSUAL_RATE <= rate <= usual * UNUSUAL_RATE:
        return
    if rate > usual:
        yield ErrorText.of("learning_rate_high", rate=rate, factor=rate / usual, method=spec.method, usual=usual)
    else:
        yield ErrorText.of("learning_rate_low", rate=rate, factor=usual / rate, method=spec.method, usual=usual)


def _cut(spec: JobSpec, report: Report, *, rows: int, role: str, most_tokens: int | None) -> Iterator[ErrorText]:
    longest, most = int(report["longest_row"]), most_tokens or MAX_LENGTH
    name = "rows_cut"
    if spec.max_length >= MAX_LENGTH:
        name = "rows_cut_at_highest_maximum"
    elif spec.max_length >= most:
        name = "rows_cut_at_maximum"
    elif longest > most:
        name = "rows_cut_beyond_maximum"
    for field, effect in (("truncated_rows", "truncated"), ("dropped_rows", "dropped")):
        number = int(report.get(field, 0))
        if number and number >= MUCH_CUT * rows:
            yield ErrorText.of(
                name,
                num_rows=number,
                of_rows=rows,
                role=role,
                max_length=spec.max_length,
                effect=effect,
                most=most,
                longest=longest,
            )


def _empty(spec: JobSpec, report: Report, *, role: str, most_tokens: int | None) -> Iterator[ErrorText]:
    """Yield a warning if rows have no trainable tokens. Each kind of row has its own causes."""
    empty, kind = int(report["empty_rows"]), report.get("kind")
    if not empty:
        return
    if kind == "text":
        yield ErrorText.of("empty_texts", num_rows=empty, role=role)
        return
    text = "empty_rows"
    if spec.max_length >= (most_tokens or MAX_LENGTH):
        text = "empty_rows_at_maximum"
    reason = EMPTY_BECAUSE.get(str(kind), EMPTY_BECAUSE["completion"])
    yield ErrorText.of(text, num_rows=empty, role=role, max_length=spec.max_length, reason=reason)

"""Warns about a job before any training: each warning has a code, a message and a remedy. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Caution:
    code: str
    message: str
    remedy: str = ""

    def sentence(self) -> str:
        return f"{self.message} {self.remedy}".strip()


def few_steps(spec: JobSpec, num_steps: int, *, usable_rows: int | None = None) -> Caution | None:
    """Return a warning if the job has few steps. `num_steps`: the final number, once the files are prepared.

    `usable_rows`: of the training file; None if unknown.
    """
    if num_steps >= FEW_STEPS:
        return None
    steps = "1 optimizer step" if num_steps == 1 else f"{num_steps} optimizer steps"
    message = f"The job has only {steps}. Fewer than {FEW_STEPS} rarely change a model noticeably."
    return Caution(code="few_steps", message=message, remedy=_more_steps(spec, num_steps, usable_rows))


def of_course(
    spec: JobSpec, *, num_steps: int, has_held_out: bool, usable_rows: int | None = None
) -> Iterator[Caution]:
    """Yield the warnings that do not depend on the rows, except on their number."""
    if (few := few_steps(spec, num_steps, usable_rows=usable_rows)) is not None:
        yield few
    yield from _rate(spec)
    if not has_held_out:
        yield Caution(
            code="no_validation_file",
            message="The job has no validation file, so overfitting will not be visible.",
            remedy="Move some rows to another file, upload it, and set validation_file to its ID.",
        )


def of_data(spec: JobSpec, report: Report, *, role: str, most_tokens: int | None = None) -> Iterator[Caution]:
    """Yield the warnings about a file. `role`: training or validation. `report`: DatasetReport of a usable file.

    `most_tokens`: the maximum of max_length for the base model; None if unknown.
    """
    rows, usable, tokens = int(report["rows"]), int(report["usable_rows"]), int(report["tokens"])
    trained = int(report["supervised_tokens"])
    if role == "training" and spec.batch_size > usable:
        lower = max(_smallest_batch(spec), usable // 8)
        usable_rows = "1 usable row" if usable == 1 else f"{usable:,} usable rows"
        yield Caution(
            code="batch_exceeds_data",
            message=f"batch_size is {spec.batch_size}, but the training file has only {usable_rows}, so "
            "every step uses some rows more than once.",
            remedy="Add rows."
            if lower >= spec.batch_size
            else f"Lower batch_size to {lower}, or add rows."
            if lower == _smallest_batch(spec)
            else f"Lower batch_size to about {lower}, or add rows.",
        )
    if tokens and trained < LOW_TRAINED_FRACTION * tokens:
        yield Caution(
            code="low_trained_fraction",
            message=f"Only {trained:,} of the {tokens:,} tokens in the {role} file ({trained / tokens:.1%}) "
            f"{'counts' if trained == 1 else 'count'} toward the loss, so most of the time is spent on prompts.",
            remedy="Check in the plan's sample rows that the right tokens count toward the loss. If they do, no "
            "action is needed, but shorter prompts reduce the cost.",
        )
    yield from _cut(spec, report, rows=rows, role=role, most_tokens=most_tokens)
    yield from _empty(spec, report, role=role, most_tokens=most_tokens)
    duplicates = int(report["duplicate_rows"])
    if duplicates and duplicates >= MANY_DUPLICATES * rows:
        yield Caution(
            code="duplicate_rows",
            message=f"{_rows(duplicates)} ({duplicates / rows:.1%}) in the {role} file "
            f"{'duplicates' if duplicates == 1 else 'duplicate'} an earlier row. All copies are used.",
            remedy="Remove the duplicate, unless you want this row to count more."
            if duplicates == 1
            else "Remove the duplicates, unless you want these rows to count more.",
        )


def of_overlap(num_rows: int, *, of_rows: int) -> Caution | None:
    """Return a warning if validation rows are trained on.

    `num_rows`: rows of the validation file that are also in the training file. `of_rows`: all rows of the validation
    file.
    """
    if not num_rows:
        return None
    return Caution(
        code="overlap",
        message=f"{num_rows:,} of {_rows(of_rows)} in the validation file {_are(num_rows)} also in the training file, "
        "so the validation loss will look better than it is.",
        remedy="Remove this row from one of the two files."
        if num_rows == 1
        else "Remove these rows from one of the two files.",
    )


def of_rank(spec: JobSpec, targets: list[Adapted], *, num_parameters: int, supervised_tokens: int) -> Iterator[Caution]:
    """Yield the warnings about the rank. `supervised_tokens`: trained tokens in one epoch."""
    above = above_limit(targets)
    if above:
        linear, lowest, names = above[0].linear, lowest_limit(above), names_of(above)
        also = other_layers(above)
        yield Caution(
            code="rank_above_layer",
            message=f"Rank {above[0].rank} exceeds the smaller dimension of {linear.path} "
            f"({linear.out_features} by {linear.in_features}), so the extra rank has no effect.{also}",
            remedy=f"To use a lower rank, train without parent adapter {spec.parent.name!r}."
            if spec.parent is not None
            else f"Lower the rank of {linear.path} to {lowest} or less, in lora.rank or lora.rank_pattern."
            if len(above) == 1
            else f"Set the ranks of {names} to {lowest} or less in lora.rank_pattern."
            if any(layer.rank != spec.lora.rank for layer in above)
            else f"Lower lora.rank to {lowest} or less, or set lower ranks for {names} in lora.rank_pattern.",
        )
    if spec.lora.rank > USUAL_RANK and num_parameters > PARAMETERS_PER_TOKEN * supervised_tokens:
        yield Caution(
            code="rank_beyond_need",
            message=f"With rank {spec.lora.rank}, the adapter has {num_parameters:,} parameters, but is trained on "
            f"only {supervised_tokens:,} {'token' if supervised_tokens == 1 else 'tokens'}.",
            remedy=f"Set lora.rank to {USUAL_RANK} or lower, which is enough for this data and needs less memory."
            if spec.parent is None
            else f"To use a lower rank, train without parent adapter {spec.parent.name!r}.",
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


def _rate(spec: JobSpec) -> Iterator[Caution]:
    """Yield a warning if the learning rate is unusual. SGD has no usual learning rate."""
    rate, kind = spec.optimizer.learning_rate, spec.optimizer.type
    if kind == "adafactor" and rate < LOWEST_ADAFACTOR:
        yield Caution(
            code="unusual_learning_rate",
            message=f"The learning rate ({rate:g}) is too low for Adafactor, which scales updates by the size of each "
            "matrix: the adapter will barely change.",
            remedy="Set optimizer.learning_rate to a value from 0.1 to 1, and omit learning_rate_multiplier.",
        )
    if kind != "adamw":
        return
    usual = BASE_LEARNING_RATE * (1.0 if spec.method == "supervised" else PREFERENCE_MULTIPLIER)
    if usual / UNUSUAL_RATE <= rate <= usual * UNUSUAL_RATE:
        return
    far = f"{rate / usual:,.0f} times" if rate > usual else f"1/{usual / rate:,.0f} of"
    follows = "training will probably diverge" if rate > usual else "the adapter will learn little"
    yield Caution(
        code="unusual_learning_rate",
        message=f"The learning rate ({rate:g}) is {far} the usual value for method {spec.method!r} ({usual:g}): "
        f"{follows}.",
        remedy="Omit optimizer.learning_rate and learning_rate_multiplier to use the default, or try a short job at "
        "each rate first.",
    )


def _or_longer_context(spec: JobSpec) -> str:
    """Return the way to a higher max_length for a job whose max_length is the maximum for its base model."""
    return "" if spec.max_length >= MAX_LENGTH else ", or choose a base model with a longer context"


def _cut(spec: JobSpec, report: Report, *, rows: int, role: str, most_tokens: int | None) -> Iterator[Caution]:
    longest, most = f"{int(report['longest_row']):,} tokens", most_tokens or MAX_LENGTH
    for field, effect in (("truncated_rows", "truncated"), ("dropped_rows", "dropped")):
        number = int(report.get(field, 0))
        if number and number >= MUCH_CUT * rows:
            yield Caution(
                code=field,
                message=f"{number:,} of {_rows(rows)} in the {role} file {_have(number)} more than {spec.max_length} "
                f"tokens and {_are(number)} {effect}.",
                remedy="max_length can't be raised, because it is already the maximum for this base model. "
                f"Shorten the rows (the longest has {longest}){_or_longer_context(spec)}."
                if spec.max_length >= most
                else f"Raise max_length to {most}, the maximum for this base model, and shorten longer rows (the "
                f"longest has {longest})."
                if int(report["longest_row"]) > most
                else f"Raise max_length (the longest row has {longest}), or shorten the rows.",
            )


def _empty(spec: JobSpec, report: Report, *, role: str, most_tokens: int | None) -> Iterator[Caution]:
    """Yield a warning if rows have no trainable tokens. Each kind of row has its own causes."""
    empty, kind = int(report["empty_rows"]), report.get("kind")
    longer = _or_longer_context(spec)
    raised = f"max_length is already the maximum ({spec.max_length} tokens). Shorten the prompts{longer}"
    if spec.max_length < (most_tokens or MAX_LENGTH):
        raised = f"Raise max_length (now {spec.max_length} tokens), or shorten the prompts"
    if empty:
        yield Caution(
            code="empty_rows",
            message=f"{_rows(empty)} in the {role} file {_have(empty)} no trainable tokens and {_are(empty)} skipped.",
            remedy="Use a longer text, or remove this row: the first token of a text is not predicted."
            if kind == "text" and empty == 1
            else "Use longer texts, or remove these rows: the first token of a text is not predicted."
            if kind == "text"
            else f"{raised}: answers that start beyond this length are ignored. To include answers with weight 0, omit "
            "'weight'."
            if kind == "chat"
            else f"{raised}: both answers must start, and differ, within this length."
            if kind == "preference"
            else f"{raised}: answers that start beyond this length are ignored.",
        )


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _have(number: int) -> str:
    return "has" if number == 1 else "have"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"

"""What a person would want to be told before a job is paid for: each with a code, a sentence and a remedy. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from catalog.spec.job import JobSpec
from catalog.spec.methods import PREFERENCE_MULTIPLIER
from catalog.spec.target_modules import Adapted
from catalog.spec.training import BASE_LEARNING_RATE

FEW_STEPS = 30
"""Of fewer optimizer steps a schedule has hardly risen before it falls, and an adapter has hardly moved."""
MOST_EPOCHS = 100
"""That a job may ask for."""
UNUSUAL_RATE = 10.0
"""Times the usual rate, or that part of it."""
LOWEST_ADAFACTOR = 0.05
"""Below it a B that begins at zero hardly moves; docs/CONFIGURATION.md says why."""
LITTLE_LEARNT = 0.05
"""Share of a file's tokens that have loss."""
MUCH_CUT = 0.05
"""Share of a file's rows that are too long."""
MANY_TWICE = 0.01
"""Share of a file's rows that equal an earlier one."""
USUAL_RANK = 16
PARAMETERS_PER_TOKEN = 20
"""Some two bits fit into a parameter of an adapter, and a token of an answer brings about one (LoRA Without Regret,
Thinking Machines 2025): with so many parameters for each token that is learnt, rank is no bound by far."""
Report = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Caution:
    code: str
    message: str
    remedy: str = ""

    def sentence(self) -> str:
        return f"{self.message} {self.remedy}".strip()


def few_steps(spec: JobSpec, num_steps: int) -> Caution | None:
    """num_steps: as they are once the files are prepared."""
    if num_steps >= FEW_STEPS:
        return None
    steps = "1 optimizer step" if num_steps == 1 else f"{num_steps} optimizer steps"
    message = f"The job has {steps}: fewer than {FEW_STEPS} seldom change a model much."
    return Caution(code="few_steps", message=message, remedy=_more_steps(spec, num_steps))


def of_course(spec: JobSpec, *, num_steps: int, has_held_out: bool) -> Iterator[Caution]:
    """What holds whatever the rows are."""
    if (few := few_steps(spec, num_steps)) is not None:
        yield few
    yield from _rate(spec)
    if not has_held_out:
        yield Caution(
            code="no_validation_file",
            message="There is no validation file, so nothing will tell whether the adapter learns or memorises.",
            remedy="Hold back some rows, and give them as validation_file.",
        )


def of_data(spec: JobSpec, report: Report, *, role: str) -> Iterator[Caution]:
    """role: training or validation, as the sentences say. report: a DatasetReport of a file that can be used."""
    rows, usable, tokens = int(report["rows"]), int(report["usable_rows"]), int(report["tokens"])
    learnt = int(report["supervised_tokens"])
    if role == "training" and spec.batch_size > usable:
        yield Caution(
            code="batch_exceeds_data",
            message=f"A batch has {spec.batch_size} rows and the training file has {usable} that can be used: every "
            "step sees some of them more than once.",
            remedy=f"Use a batch_size of {max(1, usable // 8)} or so.",
        )
    if tokens and learnt < LITTLE_LEARNT * tokens:
        yield Caution(
            code="low_trained_fraction",
            message=f"Of the {tokens:,} tokens of the {role} file {learnt:,} have loss ({learnt / tokens:.1%}): most "
            "of the time goes into reading prompts.",
            remedy="Look at the sample rows: is what you want learnt what has loss? Shorter prompts cost less.",
        )
    yield from _cut(spec, report, rows=rows, role=role)
    if empty := int(report["empty_rows"]):
        yield Caution(
            code="empty_rows",
            message=f"{_rows(empty)} of the {role} file {_have(empty)} nothing that is learnt, and {_are(empty)} left "
            "out.",
            remedy="Look at their lines: an answer of weight 0, or one that begins beyond max_length.",
        )
    twice = int(report["duplicate_rows"])
    if twice and twice >= MANY_TWICE * rows:
        yield Caution(
            code="duplicate_rows",
            message=f"{_rows(twice)} of the {role} file {_are(twice)} there before ({twice / rows:.1%}), and counted "
            "again each time.",
            remedy="Remove them, unless they are to weigh more.",
        )


def of_overlap(num_rows: int, *, of_rows: int) -> Caution | None:
    """num_rows: of the validation file, that training sees too; of_rows: that it has."""
    if not num_rows:
        return None
    return Caution(
        code="overlap",
        message=f"{_rows(num_rows)} of {of_rows} of the validation file {_are(num_rows)} in the training file too, so "
        "the held-out loss will look better than it is.",
        remedy="Remove them from one of the two.",
    )


def of_rank(spec: JobSpec, targets: list[Adapted], *, num_parameters: int, supervised_tokens: int) -> Iterator[Caution]:
    """supervised_tokens: of the training file, once."""
    above = [target for target in targets if target.rank > min(target.linear.out_features, target.linear.in_features)]
    if above:
        linear = above[0].linear
        yield Caution(
            code="rank_above_layer",
            message=f"The rank {above[0].rank} is above the smaller side of {linear.path}, which is "
            f"{linear.out_features} by {linear.in_features}: what is above it can't change anything.",
            remedy="Lower lora.rank, or give that layer a lower one by lora.rank_pattern.",
        )
    if spec.lora.rank > USUAL_RANK and num_parameters > PARAMETERS_PER_TOKEN * supervised_tokens:
        yield Caution(
            code="rank_beyond_need",
            message=f"Rank {spec.lora.rank} has {num_parameters:,} parameters, and {supervised_tokens:,} tokens are "
            "learnt.",
            remedy=f"Rank {USUAL_RANK} or less would do, and takes less memory.",
        )


def _more_steps(spec: JobSpec, num_steps: int) -> str:
    if spec.max_steps is not None and num_steps >= spec.max_steps:
        return "Raise max_steps, or leave it out."
    n_epochs = math.ceil(spec.n_epochs * FEW_STEPS / num_steps)
    if n_epochs <= MOST_EPOCHS:
        return f"{n_epochs} epochs would make that many; or use a smaller batch_size, or more rows."
    return "Use a smaller batch_size, or more rows."


def _rate(spec: JobSpec) -> Iterator[Caution]:
    """SGD has no usual rate."""
    rate, kind = spec.optimizer.learning_rate, spec.optimizer.type
    if kind == "adafactor" and rate < LOWEST_ADAFACTOR:
        yield Caution(
            code="unusual_learning_rate",
            message=f"The learning rate {rate:g} is low for Adafactor, of which it is the share of its own size by "
            "which a matrix moves: adapters hardly change at it.",
            remedy="0.1 to 1 suits them.",
        )
    if kind != "adamw":
        return
    usual = BASE_LEARNING_RATE * (1.0 if spec.preference is None else PREFERENCE_MULTIPLIER)
    if usual / UNUSUAL_RATE <= rate <= usual * UNUSUAL_RATE:
        return
    far = f"{rate / usual:,.0f} times" if rate > usual else f"1/{usual / rate:,.0f} of"
    follows = "training will hardly survive it" if rate > usual else "little will be learnt"
    yield Caution(
        code="unusual_learning_rate",
        message=f"The learning rate {rate:g} is {far} what is usual for {spec.method} ({usual:g}): {follows}.",
        remedy="Leave it out, or try two short jobs beside each other.",
    )


def _cut(spec: JobSpec, report: Report, *, rows: int, role: str) -> Iterator[Caution]:
    longest = f"Raise max_length (the longest row has {int(report['longest_row']):,} tokens), or shorten the rows."
    for field, what in (("truncated_rows", "what is beyond is cut off"), ("dropped_rows", "such rows are left out")):
        number = int(report.get(field, 0))
        if number and number >= MUCH_CUT * rows:
            yield Caution(
                code=field,
                message=f"{_rows(number)} of {rows} of the {role} file {_have(number)} more than {spec.max_length} "
                f"tokens: {what}.",
                remedy=longest,
            )


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _have(number: int) -> str:
    return "has" if number == 1 else "have"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"

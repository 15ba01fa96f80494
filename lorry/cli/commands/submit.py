"""`lorry jobs submit`: what a person asks for becomes the body of one request.

Each option stands for one field of the service, by its dotted path; limits are the service's to check.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lorry.cli.app import client
from lorry.cli.commands.keys import UNITS
from lorry.cli.commands.with_files import send_with_files
from lorry.cli.parsing.job_options import (
    ADAPTER,
    RUN,
    TRAINING,
    WATCHING,
    AlphaPattern,
    Base,
    Deadline,
    EvaluateEvery,
    Held,
    KeepOption,
    Layers,
    LossOption,
    Metadata,
    Methods,
    Neftune,
    Others,
    OverflowOption,
    Parent,
    Patience,
    Planned,
    RankPattern,
    Smoothing,
    Tags,
    Targets,
    Training,
    Warmup,
    option,
)
from lorry.cli.parsing.option_names import FIELDS, NAMES, in_typed_words
from lorry.cli.parsing.option_values import (
    Method,
    OptimizerName,
    Precision,
    Priority,
    ScheduleName,
    json_or_text,
    nested,
    pair,
)
from lorry.cli.render import output, progress_bars
from lorry.cli.render.output import AsJson
from lorry.errors import APIError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lorry.client import Lorry
    from lorry.models.jobs import Job


Made = TypeVar("Made")
OF_THE_COMMAND = frozenset({"plan", "watch", "as_json"})
"""Parameters of `submit` that say nothing of the job."""


def submit(
    ctx: typer.Context,
    model: Base = None,
    training: Training = None,
    *,
    parent: Parent = None,
    rank: Annotated[int | None, option(ADAPTER, "Rank of the adapter.")] = None,
    alpha: Annotated[float | None, option(ADAPTER, "The update is scaled by alpha/rank. Default: 2 * rank.")] = None,
    rslora: Annotated[bool, option(ADAPTER, "Scale by alpha/sqrt(rank).", "--rslora")] = False,
    dropout: Annotated[float | None, option(ADAPTER, "Probability of dropping an input of A.")] = None,
    target: Targets = None,
    layer: Layers = None,
    rank_pattern: RankPattern = None,
    alpha_pattern: AlphaPattern = None,
    dora: Annotated[bool, option(ADAPTER, "Learn the length of each output's weights as well.", "--dora")] = False,
    init: Annotated[str | None, option(ADAPTER, "default, gaussian, pissa, pissa_niter_N or olora.")] = None,
    method: Methods = None,
    beta: Annotated[float | None, option(TRAINING, "Strength of the preference; of all but supervised.")] = None,
    gamma: Annotated[float | None, option(TRAINING, "Margin that is asked for; of simpo.")] = None,
    label_smoothing: Smoothing = None,
    neftune_alpha: Neftune = None,
    loss: LossOption = None,
    learning_rate: Annotated[float | None, option(TRAINING, "Peak learning rate.", "--learning-rate", "--lr")] = None,
    lora_plus_ratio: Annotated[float | None, option(TRAINING, "Rate of B over that of A. Default: 1.")] = None,
    schedule: Annotated[ScheduleName | None, option(TRAINING, "Of the learning rate, after its warm-up.")] = None,
    warmup: Warmup = None,
    decay: Annotated[float | None, option(TRAINING, "Of wsd: part of all steps in which the rate falls.")] = None,
    optimizer: Annotated[OptimizerName | None, option(TRAINING, "sgd and adafactor need a --learning-rate.")] = None,
    weight_decay: Annotated[float | None, option(TRAINING, "Of the optimizer.")] = None,
    epochs: Annotated[int | None, option(TRAINING, "Passes over the training file.")] = None,
    max_steps: Annotated[int | None, option(TRAINING, "End after so many optimizer steps.")] = None,
    batch_size: Annotated[int | None, option(TRAINING, "Sequences, or pairs of them, per optimizer step.")] = None,
    max_length: Annotated[int | None, option(TRAINING, "Tokens of a row that are kept.")] = None,
    overflow: OverflowOption = None,
    precision: Annotated[Precision | None, option(TRAINING, "Of the base model.")] = None,
    quantization: Held = None,
    seed: Annotated[int | None, option(TRAINING, "Same seed, same adapter.")] = None,
    valid: Annotated[str | None, option(WATCHING, "Held-out file: a path or an id.")] = None,
    evaluate_every: EvaluateEvery = None,
    keep: KeepOption = None,
    patience: Patience = None,
    checkpoint_every: Annotated[int | None, option(WATCHING, "Steps between two checkpoints.")] = None,
    suffix: Annotated[str | None, option(RUN, "Becomes part of the adapter's name.")] = None,
    priority: Annotated[Priority | None, option(RUN, "Class in the queue.")] = None,
    deadline: Deadline = None,
    metadata: Metadata = None,
    tag: Tags = None,
    plan: Planned = None,
    other: Others = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and draw its progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a job; files that are paths are uploaded first. What is not said is the service's default."""
    if plan is not None:
        _check_alone(ctx)
        return _tell(client(), client().jobs.create(plan=plan), watch=watch, as_json=as_json)
    asked = read(ctx)
    lorry = client()
    job = asked.send(lorry, lorry.jobs.create)
    return _tell(lorry, job, watch=watch, as_json=as_json)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions:
    """What a person has asked for, on the command line of a job or of a plan."""

    model: str
    files: Mapping[str, str]
    """By what they were typed for, paths or ids."""
    body: Mapping[str, Any]
    typed: Mapping[str, str]
    """What set each field."""

    def send(self, lorry: Lorry, create: Callable[..., Made], *, kept_seconds: int | None = None) -> Made:
        """With the files uploaded that are paths. kept_seconds: so long, if they are; None: until they are deleted."""
        with send_with_files(lorry, self.model, self.files, kept_seconds=kept_seconds) as ids:
            return _create(create, self.model, ids, self.body, typed=self.typed)


def read(ctx: typer.Context) -> SubmitOptions:
    """Of what was typed, by the parameters of `submit`. Exits where something is missing, or said twice."""
    params = ctx.params
    for name, metavar in (("model", "MODEL"), ("training", "TRAIN")):
        if params[name] is None:
            ctx.fail(f"Missing argument '{metavar}'.")
    valid: str | None = params["valid"]
    fields = _fields(params, params["method"] or Method.supervised)
    said: list[str] = params["other"] or []
    others = [pair(given, "--set", "PATH=VALUE") for given in said]
    named = {"training_file"} if valid is None else {"training_file", "validation_file"}
    _check_said_once({"model", *named, *fields}, [path for path, _ in others])
    return SubmitOptions(
        model=params["model"],
        files={"TRAIN": params["training"]} | ({} if valid is None else {"--valid": valid}),
        body=nested([*fields.items(), *((path, json_or_text(text)) for path, text in others)]),
        typed={**{path: f"--set {path}" for path, _ in others}, **{path: NAMES[path] for path in fields}},
    )


def _check_alone(ctx: typer.Context) -> None:
    """A plan says all of a job."""
    said = [name for name, value in ctx.params.items() if name not in OF_THE_COMMAND and _is_given(value)]
    if said:
        ctx.fail(f"--plan says all of the job: leave out {', '.join(sorted(said))}, or plan anew with that.")


def _fields(params: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """By dotted path, what the options say."""
    given = {path: (name, params[name]) for name, path in FIELDS.items() if _is_given(params[name])}
    fields = {path.replace("METHOD", method): _value(name, value) for path, (name, value) in given.items()}
    metadata: list[str] = params["metadata"] or []
    pairs = _by_key([pair(entry, "--metadata", "KEY=VALUE") for entry in metadata], "--metadata")
    labels = {"metadata": pairs, "tags": params["tag"]}
    return fields | {name: given for name, given in labels.items() if given}


def _tell(lorry: Lorry, job: Job, *, watch: bool, as_json: bool) -> None:
    if watch:
        output.say(f"Job {job.id} was created.")  # first: watching needs another scope
        progress_bars.stay(lorry, [job.id], as_json=as_json)
    elif as_json:
        output.print_json(job.raw)
    else:
        output.console().print(job.id)


def _is_given(value: object) -> bool:
    """A zero is."""
    return value is not None and value is not False and value not in ([], ())


def _value(name: str, given: Any) -> Any:
    """What the service reads, from what was typed."""
    if name == "deadline":
        return _moment(given)
    if name in ("rank_pattern", "alpha_pattern"):
        option = f"--{name.replace('_', '-')}"
        return _by_key([_entry(each, option) for each in given], option)
    if name == "target" and len(given) == 1 and (given[0] == "all-linear" or given[0].startswith("re:")):
        return given[0]
    return given


def _moment(given: str) -> int:
    """Seconds since 1970."""
    if match := re.fullmatch(r"(\d+)([smhd])", given):
        return int(time.time()) + int(match[1]) * UNITS[match[2]]
    try:
        return int(datetime.fromisoformat(given).timestamp())
    except ValueError:
        raise typer.BadParameter(
            f"{given!r} is no time: write 12h, or 2026-12-01T08:00.", param_hint="--deadline"
        ) from None


def _by_key(pairs: Sequence[tuple[str, Any]], option: str) -> dict[str, Any]:
    """Of two values for one key none is the right one."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise typer.BadParameter(f"{key!r} is given twice. Say it once.", param_hint=option)
        found[key] = value
    return found


def _entry(given: str, option: str) -> tuple[str, Any]:
    """A key may hold "=" itself, as (?=…) does."""
    key, equals, value = given.rpartition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{given!r} is not of the form KEY=NUMBER.", param_hint=option)
    return key, json_or_text(value)


def _check_said_once(by_option: Iterable[str], by_set: Iterable[str]) -> None:
    """Of two values for one field none is the right one. An object and a field in it are one field too."""
    said = [(path, NAMES[path]) for path in by_option]
    for path in by_set:
        for earlier, name in said:
            if f"{path}.".startswith(f"{earlier}.") or f"{earlier}.".startswith(f"{path}."):
                message = f"{name} and --set {path} say the same field. Say it once."
                raise typer.BadParameter(message, param_hint="--set")
        said.append((path, f"--set {path}"))


def _create(
    create: Callable[..., Made],
    model: str,
    ids: Mapping[str, str],
    body: Mapping[str, Any],
    *,
    typed: Mapping[str, str],
) -> Made:
    """A refusal names the option where the service names the field."""
    try:
        return create(model=model, training_file=ids["TRAIN"], validation_file=ids.get("--valid"), extra_body=body)
    except APIError as error:
        in_typed_words(error, typed)
        raise

"""`lorry jobs submit`: what a person asks for becomes the body of one request.

Each option stands for one field of the service, by its dotted path; limits are the service's to check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import output, watching
from lorry.cli.app import client
from lorry.cli.choices import Keep, Loss, Method, Optimizer, Overflow, Precision, Priority, Quantisation, Schedule
from lorry.cli.field_names import FIELDS, NAMES, in_typed_words
from lorry.cli.output import AsJson
from lorry.cli.typed import json_or_text, nested, pair
from lorry.cli.uploading import send_with_files
from lorry.errors import APIError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorry.client import Lorry
    from lorry.models import Job


ADAPTER, TRAINING, WATCHING, RUN = "Adapter", "Training", "Evaluation and checkpoints", "The job"


def _option(group: str, help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=group, metavar=metavar)


Training = Annotated[str, typer.Argument(metavar="TRAIN", help="A JSONL file's path, or the id of an uploaded one.")]
Methods = Annotated[
    Method | None,
    _option(
        TRAINING,
        "Learn from answers (supervised, the default), from pairs of a better and a worse one, or from labels (kto).",
    ),
]
Held = Annotated[
    Quantisation | None,
    _option(TRAINING, "Hold the base model in 4 or 8 bits.", "--quantisation", "--quantization"),
]
Parent = Annotated[
    str | None,
    _option(
        ADAPTER,
        "Continue this adapter of the same base model: its id or name. Its shape is then the parent's.",
        metavar="ADAPTER",
    ),
]
Targets = Annotated[
    list[str] | None,
    _option(
        ADAPTER,
        "Linear layer to adapt; may be repeated. Or one re:PATTERN, for paths. Default: all but the output head.",
        metavar="NAME",
    ),
]
Layers = Annotated[
    list[int] | None, _option(ADAPTER, "Only in the block of this number, from 0; may be repeated.", metavar="NUMBER")
]
RankPattern = Annotated[
    list[str] | None,
    _option(ADAPTER, "Another rank for layers whose path ends in KEY; may be repeated.", metavar="KEY=RANK"),
]
AlphaPattern = Annotated[
    list[str] | None, _option(ADAPTER, "Another alpha, in the same way; may be repeated.", metavar="KEY=ALPHA")
]
Smoothing = Annotated[
    float | None, _option(TRAINING, "Of labels, or of dpo the part of swapped pairs; from 0 to below 0.5.")
]
Neftune = Annotated[
    float | None, _option(TRAINING, "Scale of noise on input embeddings, of supervised; 5 is common, 0 is none.")
]
LossOption = Annotated[
    Loss | None, _option(TRAINING, "Of a chat: learn every answer (assistant, the default), or only the last one.")
]
OverflowOption = Annotated[
    Overflow | None,
    _option(TRAINING, "What becomes of a row above --max-length; only plain texts are split. Default: truncate."),
]
Warmup = Annotated[float | None, _option(TRAINING, "Part of all steps in which the rate rises, from 0 to 1.")]
EvaluateEvery = Annotated[
    int | None, _option(WATCHING, "Steps between two readings of the held-out file. Default: a tenth of the job.")
]
KeepOption = Annotated[
    Keep | None, _option(WATCHING, "Whose weights become the adapter. Default: best with --patience, else last.")
]
Patience = Annotated[
    int | None, _option(WATCHING, "End early after so many readings in a row without a fall of the loss.")
]
Metadata = Annotated[list[str] | None, _option(RUN, "Kept with the job; may be repeated.", metavar="KEY=VALUE")]
Others = Annotated[
    list[str] | None,
    _option(
        RUN,
        "Any other field, such as optimizer.beta1=0.95; the value is JSON or text. May be repeated.",
        "--set",
        metavar="PATH=VALUE",
    ),
]


def submit(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A base model's name, or an adapter's to continue.")],
    training: Training,
    *,
    parent: Parent = None,
    rank: Annotated[int | None, _option(ADAPTER, "Rank of the adapter.")] = None,
    alpha: Annotated[float | None, _option(ADAPTER, "The update is scaled by alpha/rank. Default: 2 * rank.")] = None,
    rslora: Annotated[bool, _option(ADAPTER, "Scale by alpha/sqrt(rank).", "--rslora")] = False,
    dropout: Annotated[float | None, _option(ADAPTER, "Probability of dropping an input of A.")] = None,
    target: Targets = None,
    layer: Layers = None,
    rank_pattern: RankPattern = None,
    alpha_pattern: AlphaPattern = None,
    dora: Annotated[bool, _option(ADAPTER, "Learn the length of each output's weights as well.", "--dora")] = False,
    init: Annotated[str | None, _option(ADAPTER, "default, gaussian, pissa, pissa_niter_N or olora.")] = None,
    method: Methods = None,
    beta: Annotated[float | None, _option(TRAINING, "Strength of the preference; of all but supervised.")] = None,
    gamma: Annotated[float | None, _option(TRAINING, "Margin that is asked for; of simpo.")] = None,
    label_smoothing: Smoothing = None,
    neftune_alpha: Neftune = None,
    loss: LossOption = None,
    learning_rate: Annotated[float | None, _option(TRAINING, "Peak learning rate.", "--learning-rate", "--lr")] = None,
    lora_plus_ratio: Annotated[float | None, _option(TRAINING, "Rate of B over that of A. Default: 1.")] = None,
    schedule: Annotated[Schedule | None, _option(TRAINING, "Of the learning rate, after its warm-up.")] = None,
    warmup: Warmup = None,
    decay: Annotated[float | None, _option(TRAINING, "Of wsd: part of all steps in which the rate falls.")] = None,
    optimizer: Annotated[Optimizer | None, _option(TRAINING, "sgd and adafactor need a --learning-rate.")] = None,
    weight_decay: Annotated[float | None, _option(TRAINING, "Of the optimizer.")] = None,
    epochs: Annotated[int | None, _option(TRAINING, "Passes over the training file.")] = None,
    max_steps: Annotated[int | None, _option(TRAINING, "End after so many optimizer steps.")] = None,
    batch_size: Annotated[int | None, _option(TRAINING, "Sequences, or pairs of them, per optimizer step.")] = None,
    max_length: Annotated[int | None, _option(TRAINING, "Tokens of a row that are kept.")] = None,
    overflow: OverflowOption = None,
    precision: Annotated[Precision | None, _option(TRAINING, "Of the base model.")] = None,
    quantisation: Held = None,
    seed: Annotated[int | None, _option(TRAINING, "Same seed, same adapter.")] = None,
    valid: Annotated[str | None, _option(WATCHING, "Held-out file: a path or an id.")] = None,
    evaluate_every: EvaluateEvery = None,
    keep: KeepOption = None,
    patience: Patience = None,
    checkpoint_every: Annotated[int | None, _option(WATCHING, "Steps between two checkpoints.")] = None,
    suffix: Annotated[str | None, _option(RUN, "Becomes part of the adapter's name.")] = None,
    priority: Annotated[Priority | None, _option(RUN, "Class in the queue.")] = None,
    metadata: Metadata = None,
    other: Others = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and draw its progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a job; files that are paths are uploaded first. What is not said is the service's default."""
    fields = _fields(ctx.params, method or Method.supervised)
    others = [pair(given, "--set", "PATH=VALUE") for given in other or []]
    files = {"training_file"} if valid is None else {"training_file", "validation_file"}
    _check_said_once({"model", *files, *fields}, [path for path, _ in others])
    body = nested([*fields.items(), *((path, json_or_text(text)) for path, text in others)])
    lorry = client()
    given_files = {"TRAIN": training} if valid is None else {"TRAIN": training, "--valid": valid}
    typed = {**{path: f"--set {path}" for path, _ in others}, **{path: NAMES[path] for path in fields}}
    job = _send(lorry, model, given_files, body, typed=typed)
    _tell(lorry, job, watch=watch, as_json=as_json)


def _fields(params: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """By dotted path, what the options say."""
    given = {path: (name, params[name]) for name, path in FIELDS.items() if _is_given(params[name])}
    fields = {path.replace("METHOD", method): _value(name, value) for path, (name, value) in given.items()}
    metadata: list[str] = params["metadata"] or []
    pairs = _by_key([pair(entry, "--metadata", "KEY=VALUE") for entry in metadata], "--metadata")
    return fields | ({"metadata": pairs} if pairs else {})


def _send(
    lorry: Lorry, model: str, given_files: Mapping[str, str], body: Mapping[str, Any], *, typed: Mapping[str, str]
) -> Job:
    with send_with_files(lorry, model, given_files) as ids:
        return _create(lorry, model, ids, body, typed=typed)


def _tell(lorry: Lorry, job: Job, *, watch: bool, as_json: bool) -> None:
    if watch:
        watching.stay(lorry, [job.id], as_json=as_json)
    elif as_json:
        output.print_json(job.raw)
    else:
        output.console().print(job.id)


def _is_given(value: object) -> bool:
    """A zero is."""
    return value is not None and value is not False and value not in ([], ())


def _value(name: str, given: Any) -> Any:
    """What the service reads, from what was typed."""
    if name in ("rank_pattern", "alpha_pattern"):
        option = f"--{name.replace('_', '-')}"
        return _by_key([_entry(each, option) for each in given], option)
    if name == "target" and len(given) == 1 and (given[0] == "all-linear" or given[0].startswith("re:")):
        return given[0]
    return given


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
    lorry: Lorry, model: str, ids: Mapping[str, str], body: Mapping[str, Any], *, typed: Mapping[str, str]
) -> Job:
    """A refusal names the option where the service names the field."""
    try:
        return lorry.jobs.create(
            model=model, training_file=ids["TRAIN"], validation_file=ids.get("--valid"), extra_body=body
        )
    except APIError as error:
        in_typed_words(error, typed)
        raise

"""`lorry jobs submit`: the options become the body of one request.

Each option sets one field of the API, given by its dotted path. The service checks the limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lorry.cli import lookup
from lorry.cli.app import client
from lorry.cli.commands.with_files import send_with_files
from lorry.cli.parsing.job_options import ARGUMENTS, RUN, given_fields, is_given, option, with_job_options
from lorry.cli.parsing.option_names import NAMES, use_option_names
from lorry.cli.parsing.option_values import json_or_text, nested, pair
from lorry.cli.render import output, progress_bars
from lorry.cli.render.output import AsJson, Quiet
from lorry.errors import APIError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lorry.client import Lorry
    from lorry.models import Job


Made = TypeVar("Made")
OUTPUT_OPTIONS = frozenset({"plan", "watch", "quiet", "as_json", "output_format"})
"""Parameters of `submit` that set no field of the job."""


@with_job_options(before="plan")
def submit(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Name of a base model, or of an adapter to continue.", show_default=False),
    ] = None,
    training: Annotated[
        str | None,
        typer.Argument(metavar="TRAIN", help="Path of a JSONL file, or ID of an uploaded file.", show_default=False),
    ] = None,
    *,
    model_option: Annotated[
        str | None, option(ARGUMENTS, "Same as MODEL, as in OpenAI's CLI.", "--model", "-m", metavar="MODEL")
    ] = None,
    training_option: Annotated[
        str | None, option(ARGUMENTS, "Same as TRAIN, as in OpenAI's CLI.", "--training-file", "-F", metavar="TRAIN")
    ] = None,
    plan: Annotated[
        str | None,
        option(
            RUN,
            "Create the job from an existing plan, unchanged. Can't be combined with other options.",
            metavar="PLAN",
        ),
    ] = None,
    other: Annotated[
        list[str] | None,
        option(
            RUN,
            "Any field of the API, such as optimizer.max_grad_norm=null; the value is JSON or text (repeatable).",
            "--set",
            metavar="PATH=VALUE",
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show live progress until the job is finished.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **_fields: Any,
) -> None:
    """Submit a fine-tuning job. Local files are uploaded first. Omitted options use the service defaults."""
    lorry, job = _submit_request(ctx, plan, quiet=quiet)
    _report(lorry, job, watch=watch, as_json=as_json)


def _submit_request(ctx: typer.Context, plan: str | None, *, quiet: bool) -> tuple[Lorry, Job]:
    if plan is not None:
        _check_alone(ctx)
        lorry = client()
        return lorry, lorry.jobs.create(plan=lookup.plan(lorry, plan))
    options = read(ctx)
    lorry = client()
    return lorry, options.send(lorry, lorry.jobs.create, quiet=quiet)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions:
    """The options of a job or of a plan on the command line."""

    model: str
    files: Mapping[str, str]
    """Paths or ids, by the argument or option that they were passed for."""
    body: Mapping[str, Any]
    typed: Mapping[str, str]
    """The option that set each field."""

    def send(
        self, lorry: Lorry, create: Callable[..., Made], *, kept_seconds: int | None = None, quiet: bool = False
    ) -> Made:
        """Upload the local files and send the request.

        kept_seconds: the time after which uploaded files are deleted; None: they are kept.
        """
        body = dict(self.body)
        if "parent_adapter" in body:
            body["parent_adapter"] = lookup.adapter(lorry, body["parent_adapter"])
        with send_with_files(lorry, self.model, self.files, kept_seconds=kept_seconds, quiet=quiet) as ids:
            return _create(create, self.model, ids, body, typed=self.typed)


def read(ctx: typer.Context) -> SubmitOptions:
    """Read the parameters of `submit`. Exits if an argument is missing, or if a field is set twice."""
    params = ctx.params
    model = _argument(ctx, "model", "MODEL", "--model")
    training = _argument(ctx, "training", "TRAIN", "--training-file")
    valid: str | None = params["valid"]
    fields = given_fields(params)
    fields.pop("validation_file", None)
    assigned: list[str] = params["other"] or []
    others = [pair(given, "--set", "PATH=VALUE") for given in assigned]
    named = {"training_file"} if valid is None else {"training_file", "validation_file"}
    _check_set_once({"model", *named, *fields}, [path for path, _ in others])
    return SubmitOptions(
        model=model,
        files={"TRAIN": training} | ({} if valid is None else {"--valid": valid}),
        body=nested([*fields.items(), *((path, json_or_text(text)) for path, text in others)]),
        typed={**{path: f"--set {path}" for path, _ in others}, **{path: NAMES[path] for path in fields}},
    )


def _argument(ctx: typer.Context, name: str, metavar: str, option_name: str) -> str:
    """Return the value of an argument that may be passed as an option instead."""
    values = [value for value in (ctx.params[name], ctx.params[f"{name}_option"]) if value is not None]
    if not values:
        ctx.fail(f"Missing argument '{metavar}'.")
    if len(values) > 1:
        ctx.fail(f"{metavar} and {option_name} set the same field. Pass only one.")
    return values[0]


def _check_alone(ctx: typer.Context) -> None:
    """A plan is the whole configuration of a job."""
    given = [name for name, value in ctx.params.items() if name not in OUTPUT_OPTIONS and is_given(value)]
    if given:
        options = ", ".join(sorted(_typed_name(name) for name in given))
        ctx.fail(f"--plan can't be combined with {options}. Create a new plan with these options instead.")


def _typed_name(name: str) -> str:
    return {"model": "MODEL", "training": "TRAIN", "other": "--set"}.get(
        name, f"--{name.removesuffix('_option').replace('_', '-')}"
    )


def _report(lorry: Lorry, job: Job, *, watch: bool, as_json: bool) -> None:
    if watch:
        output.echo(f"Created job {job.id}.")  # first: watching needs another scope
        progress_bars.watch_until_final(lorry, [job.id], as_json=as_json)
    elif as_json:
        output.print_json(job.raw)
    else:
        output.print_ids([job.id])


def _check_set_once(by_option: Iterable[str], by_set: Iterable[str]) -> None:
    """Reject two values for one field. An object and a field in it count as one field too."""
    seen = [(path, NAMES[path]) for path in by_option]
    for path in by_set:
        for earlier, name in seen:
            if f"{path}.".startswith(f"{earlier}.") or f"{earlier}.".startswith(f"{path}."):
                message = f"{name} and --set {path} set the same field. Pass only one."
                raise typer.BadParameter(message, param_hint="--set")
        seen.append((path, f"--set {path}"))


def _create(
    create: Callable[..., Made],
    model: str,
    ids: Mapping[str, str],
    body: Mapping[str, Any],
    *,
    typed: Mapping[str, str],
) -> Made:
    """Send the request. An error names the option instead of the field of the API."""
    try:
        return create(model=model, training_file=ids["TRAIN"], validation_file=ids.get("--valid"), extra_body=body)
    except APIError as error:
        use_option_names(error, typed)
        raise

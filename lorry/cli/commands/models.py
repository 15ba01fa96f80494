"""`lorry models`: base models, and the adapters trained on them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli.app import client, group
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.tables import Column, date, listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorry.models import Model

app = group("Manage base models.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")]


class Kind(StrEnum):
    """The types of a source."""

    hub = "hub"
    folder = "folder"
    gguf = "gguf"


@app.verb(
    "add",
    "lorry models add smollm2 HuggingFaceTB/SmolLM2-135M-Instruct",
    "lorry models add smollm2 HuggingFaceTB/SmolLM2-135M-Instruct --revision main --no-wait",
    "lorry models add tiny ./models/tiny.gguf",
    "lorry models add qwen-base Qwen/Qwen2.5-0.5B --chat-template chatml",
)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to give the base model.")],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hugging Face Hub ID, folder of safetensors files, or GGUF file.")
    ],
    *,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of a Hub ID (default: the main branch).")
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Source type, if it can't be inferred.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Chat template: chatml, gemma, llama3, zephyr, or a Jinja file (default: the model's own).",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the import is finished.")] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Import a base model and record its digest (operator key required)."""
    lorry = client()
    model = lorry.models.add(
        name,
        source,
        kind=None if kind is None else kind.value,
        revision=revision,
        chat_template=None if chat_template is None else _template(chat_template),
    )
    if wait:
        with output.waiting(f"Importing {name}") as report:
            model = lorry.models.wait(name, on_progress=_reporting_errors(report))
    if as_json:
        output.print_json(model.raw)
    elif quiet:
        output.print_ids([model.id or name])
    elif model.state == "ready":
        output.echo(f"Model {name} is ready, digest {model.digest}.")
    else:
        output.echo(f"Importing model {name}. Check its state with: lorry models show {name}")


def _reporting_errors(report: Callable[[object], None]) -> Callable[[Model], None]:
    """Return a function to call at each poll, which prints the error of each attempt once, and calls `report`."""
    shown = ""

    def on_progress(model: Model) -> None:
        nonlocal shown
        if model.state == "importing" and model.error and model.error.message != shown:
            shown = model.error.message
            output.echo(f"{shown} {model.error.remedy or ''}".rstrip())
        report(model)

    return on_progress


@app.verb("list", "lorry models list", "lorry models list -q", "lorry models list --json")
def list_(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List base models and the adapters trained on them."""
    columns = (
        Column("NAME", "id"),
        Column("KIND", "kind", priority=1),
        Column("STATE", "state"),
        Column("INFERENCE", "inference", priority=5),
        Column("BASE", "base", priority=3, min_width=12),
        Column("DIGEST", lambda model: output.short(model.digest), priority=2),
        Column("CREATED", date("created"), priority=4),
    )
    empty = "No models yet. Add one with `lorry models add NAME SOURCE`."
    models = listing(client().models.list(), columns, empty=empty, as_json=as_json, quiet=quiet)
    for model in models:
        if model.error:
            output.echo(f"{model.id} {model.state}: {output.brief(model.error.message)}")
    if failed := [model.id for model in models if model.error]:
        output.echo(f"Show the whole error and its fix with: lorry models show {failed[0]}")


@app.verb("show", "lorry models show smollm2", "lorry models show smollm2 --json")
def show(name: Name, as_json: AsJson = False) -> None:
    """Show a model's details, and why its import failed."""
    model = client().models.get(name)
    output.print_facts(model, _facts(model), as_json=as_json)


@app.verb("delete", "lorry models delete smollm2", "lorry models delete smollm2 --yes")
def delete(name: Name, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a base model or an adapter. This can't be undone.

    Deleting a base model requires an operator key, and fails while a job uses it. Adapters trained on it are kept.
    """
    is_adapter = name.startswith("ft:")
    kind = "adapter" if is_adapter else "base model"
    output.confirm(f"Delete {kind} {name}? This can't be undone.", yes=yes)
    client().models.delete(name)
    output.print_deleted(kind, name, as_json=as_json, note="" if is_adapter else " Adapters trained on it are kept.")


def _template(given: str) -> str:
    """Return the text of the file, or else the name of a template, which the service checks."""
    path = Path(given).expanduser()
    if not path.is_file():
        return given
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{given} can't be read: {error}", param_hint="--chat-template") from error


def _facts(model: Model) -> Iterator[tuple[str, object]]:
    yield "name", model.id
    yield "kind", model.kind
    yield "state", model.state
    yield "inference", model.inference
    yield "error", model.error and model.error.message
    yield "fix", model.error and model.error.remedy
    yield "base", model.base
    yield "source", model.source
    yield "revision", model.revision
    yield "digest", model.digest
    yield "folder", model.local_path
    yield "created", output.when(model.created or None)
    yield "license", (model.description or {}).get("license")
    shapes = ("architecture", "num_parameters", "num_layers", "hidden_size", "vocab_size", "max_positions", "dtype")
    for name in shapes:
        yield name.removeprefix("num_").replace("_", " "), (model.description or {}).get(name)
    for name, field in (("chat template", "has_chat_template"), ("renders tools", "renders_tools")):
        value = (model.description or {}).get(field)
        yield name, None if value is None else "yes" if value else "no"

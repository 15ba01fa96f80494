"""`lorry models`: base models, and the adapters trained on them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli.app import client, group
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorry.models.jobs import Model

app = group("Base models and adapters.")


class Kind(StrEnum):
    """What a source is."""

    hub = "hub"
    folder = "folder"
    gguf = "gguf"


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What jobs will call the base.")],
    source: Annotated[str, typer.Argument(help="A hub id, a folder of safetensors, or a GGUF file.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Where it can't be seen from SOURCE.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the import is done.")] = True,
    as_json: AsJson = False,
) -> None:
    """Import a base model, and record its digest."""
    lorry = client()
    model = lorry.models.add(name, source, kind=None if kind is None else kind.value, revision=revision)
    if wait:
        with output.messages().status(f"Importing {output.clean(name)}"):
            model = lorry.models.wait(name)
    if as_json:
        output.print_json(model.raw)
    elif model.state == "ready":
        output.say(f"{name} is ready, digest {model.digest}.")
    else:
        output.say(f"{name} is being imported; `lorry models list` shows when it is ready.")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """What jobs can train on, and what they made."""
    models = list(client().models.list())
    if as_json:
        return output.print_json([model.raw for model in models])
    rows = [(m.id, m.kind, m.state, m.base, output.short(m.digest), output.briefly(m.created)) for m in models]
    table(
        (
            Column(title="NAME"),
            Column(title="KIND", goes=1),
            Column(title="STATE"),
            Column(title="BASE", goes=3, narrowest=12),
            Column(title="DIGEST", goes=2),
            Column(title="CREATED", goes=4),
        ),
        rows,
        empty="There is no model yet. Add one with `lorry models add NAME SOURCE`.",
    )
    for model in models:
        if model.error:
            output.say(f"{model.id} {model.state}: {output.brief(model.error.message)}")
    if any(model.error for model in models):
        output.say("All of it, and what to do: lorry models show NAME")
    return None


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    as_json: AsJson = False,
) -> None:
    """One model, and why its import failed."""
    model = client().models.get(name)
    if as_json:
        output.print_json(model.raw)
    else:
        output.pairs(_facts(model))


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter or a base model.

    A base takes an operator's key and stays while a job uses it. Adapters that were trained on it stay.
    """
    is_adapter = name.startswith("ft:")
    what = "the adapter" if is_adapter else "the base model"
    output.confirm(f"Delete {what} {name}?", yes=yes)
    client().models.delete(name)
    if as_json:
        output.print_json({"id": name, "deleted": True})
    else:
        output.say(f"{name} is deleted.{'' if is_adapter else ' What was trained on it stays.'}")


def _facts(model: Model) -> Iterator[tuple[str, object]]:
    yield "name", model.id
    yield "kind", model.kind
    yield "state", model.state
    yield "error", model.error and model.error.message
    yield "what to do", model.error and model.error.remedy
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

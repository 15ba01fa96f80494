"""`lorry adapters export` and the other commands for exports of an adapter. They belong to the group `adapters`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli import lookup
from lorry.cli.app import EXIT_INTERRUPTED, client
from lorry.cli.commands.adapters import Name, app, folder_name
from lorry.cli.commands.files import byte_bar
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.serving import print_export_usage
from lorry.cli.render.tables import Column, date, listing

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.models import AdapterExport

Export = Annotated[str, typer.Argument(metavar="EXPORT", help="ID of the export.")]


class ExportFormat(StrEnum):
    """The formats of an export."""

    merged = "merged"
    gguf = "gguf"
    gguf_lora = "gguf-lora"
    adapter = "adapter"


class GgufQuantization(StrEnum):
    """How a GGUF model stores its matrices."""

    f16 = "f16"
    q8_0 = "q8_0"


_GGUF_TYPE = re.compile(r"(i?q\d|tq\d|mxfp\d|b?f(16|32))", re.IGNORECASE)
"""How the names of llama.cpp's types begin, such as q4_k_m."""
WORTH_A_WARNING = 0.1
"""Share of an adapter's update lost by rounding from which on the CLI prints a warning."""
_OTHER_TYPES = (
    "Lorry writes f16 and q8_0. For another type, export with `--format gguf --quantization f16`, and convert the file "
    "with llama.cpp's llama-quantize."
)


def _format(typed: str) -> ExportFormat:
    """Return the format. A GGUF type in its place gets an error that shows how to ask for it."""
    name = typed.lower()
    if name in set(ExportFormat):
        return ExportFormat(name)
    formats = f"The formats are {', '.join(ExportFormat)}."
    if name in set(GgufQuantization):
        raise typer.BadParameter(
            f"{typed!r} is a quantization of the format gguf. Use `--format gguf --quantization {name}`. {formats}"
        )
    if _GGUF_TYPE.match(name):
        raise typer.BadParameter(f"{typed!r} is a type of a GGUF file, not a format. {_OTHER_TYPES} {formats}")
    raise typer.BadParameter(f"{typed!r} is not a format. {formats}")


def _quantization(typed: str) -> GgufQuantization:
    name = typed.lower()
    if name in set(GgufQuantization):
        return GgufQuantization(name)
    raise typer.BadParameter(f"{typed!r} is not a quantization of an export. {_OTHER_TYPES}")


@app.verb(
    "export",
    "lorry adapters export support --format gguf",
    "lorry adapters export support --format gguf --quantization f16 --to ./support-gguf",
    "lorry adapters export support --format merged --hub-repository my-org/support",
)
def export(
    adapter: Name,
    *,
    format: Annotated[  # noqa: A002
        ExportFormat,
        typer.Option(
            parser=_format,
            metavar=f"<{'|'.join(ExportFormat)}>",
            help="Format. merged: safetensors with the merged weights; gguf: a merged model for llama.cpp and Ollama; "
            "gguf-lora: the adapter alone for llama.cpp; adapter: the adapter's files, for the Hub.",
        ),
    ],
    quantization: Annotated[
        GgufQuantization | None,
        typer.Option(
            parser=_quantization,
            metavar=f"<{'|'.join(GgufQuantization)}>",
            help="Storage of the matrices for gguf (default: q8_0).",
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="New folder to download into (default: ./NAME-FORMAT).")
    ] = None,
    hub_repository: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Upload the files to the Hugging Face Hub instead of downloading them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export an adapter for a serving engine, verify it, and download it.

    A worker writes the files and compares their logits with those of the adapted model. Ctrl-C does not stop it: the
    same command continues.
    """
    if to is not None and hub_repository is not None:
        raise typer.BadParameter("--to can't be combined with --hub-repository.", param_hint="--to")
    lorry = client()
    found = lorry.adapters.get(lookup.adapter(lorry, adapter))
    made = lorry.adapters.export(
        found.id,
        format.value,
        quantization=None if quantization is None else quantization.value,
        hub_repository=hub_repository,
    )
    done = _waited(lorry, made)
    if hub_repository is not None:
        path = None
    else:
        kind = "-".join(part for part in (done.format, done.quantization) if part)
        target = to or Path(f"{folder_name(found.name)}-{kind}")
        with byte_bar(f"Downloading {done.id}") as on_progress:
            path = lorry.adapters.exports.pull(found.id, done.id, target, on_progress=on_progress)
    if as_json:
        output.print_json({**done.raw, "path": None if path is None else str(path.resolve())})
        return
    if path is None:
        output.console().print(done.hub_url or "", soft_wrap=True)
    else:
        output.console().print(str(path), soft_wrap=True)
    for line in _measured(done):
        output.echo(line)
    if path is not None:
        print_export_usage(path, done)


@app.verb("exports", "lorry adapters exports support", "lorry adapters exports support --json")
def exports(adapter: Name, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the exports of an adapter, newest first."""
    lorry = client()
    name = lookup.adapter(lorry, adapter)
    columns = (
        Column("EXPORT", "id"),
        Column("FORMAT", "format"),
        Column("QUANTIZATION", "quantization", priority=3),
        Column("STATUS", "status"),
        Column("SIZE", lambda one: output.size(one.bytes) if one.bytes else None, priority=1),
        Column("LOGIT DIFFERENCE", lambda one: one.verification.max_abs_diff, priority=2),
        Column("HUB", "hub_repository", priority=4),
        Column("CREATED", date("created_at"), priority=5),
    )
    empty = f"No exports yet. Create one with `lorry adapters export {name} --format gguf`."
    for one in listing(lorry.adapters.exports.list(name), columns, empty=empty, as_json=as_json, quiet=quiet):
        if one.error is not None:
            output.echo(f"{one.id} {one.status}: {one.error.message} {one.error.remedy}")


@app.verb(
    "cancel-export",
    "lorry adapters cancel-export support export-3f2b",
    "lorry adapters cancel-export support export-3f2b --json",
)
def cancel_export(adapter: Name, export_id: Export, as_json: AsJson = False) -> None:
    """Cancel an unfinished export."""
    lorry = client()
    name = lookup.adapter(lorry, adapter)
    cancelled = lorry.adapters.exports.cancel(name, lookup.export(lorry, name, export_id))
    output.print_result(cancelled, f"Cancelled export {cancelled.id}.", as_json=as_json)


@app.verb(
    "delete-export",
    "lorry adapters delete-export support export-3f2b",
    "lorry adapters delete-export support export-3f2b --yes",
)
def delete_export(adapter: Name, export_id: Export, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete an export with its files. An upload to the Hub is not deleted."""
    lorry = client()
    name = lookup.adapter(lorry, adapter)
    full_id = lookup.export(lorry, name, export_id)
    output.confirm(f"Delete export {full_id}? This can't be undone.", yes=yes)
    lorry.adapters.exports.delete(name, full_id)
    output.print_deleted("export", full_id, as_json=as_json)


def _waited(lorry: Lorry, made: AdapterExport) -> AdapterExport:
    try:
        with output.waiting(f"Exporting {made.adapter_name} as {made.format}") as report:
            told: set[str] = set()

            def show(export: AdapterExport) -> None:
                if export.status == "queued" and export.error is not None and export.error.code not in told:
                    told.add(export.error.code)
                    output.echo(
                        f"The export waits for a worker. {export.error.message} {export.error.remedy or ''}".rstrip()
                    )
                report(export)

            return lorry.adapters.exports.wait(made.adapter, made.id, on_progress=show)
    except KeyboardInterrupt:
        name = made.adapter_name
        output.echo(f"The export {made.id} continues. To wait for it again, repeat the command.")
        output.echo(f"To cancel it: lorry adapters cancel-export {name} {made.id}")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _measured(export: AdapterExport) -> Iterator[str]:
    """Yield what was measured, as sentences."""
    check, cost = export.verification, export.cost
    if check.explanation is not None:
        yield check.explanation
    elif check.max_abs_diff is not None:
        yield (
            f"Its logits differ from those of the adapted model by at most {output.cell(check.max_abs_diff)}. Rounding "
            f"to the format explains up to {output.cell(check.tolerance)}."
        )
    to_trained = check.raw.get("max_abs_diff_to_trained")
    if to_trained is not None:
        yield (
            "The base model was quantized in training. Merged without quantization, the logits differ from those of "
            f"training by {output.cell(to_trained)}."
        )
    lost = check.raw.get("update_error") or 0.0
    if lost >= WORTH_A_WARNING:
        yield (
            f"Warning: rounding has removed {lost:.0%} of what the adapter adds to the weights. The adapter itself "
            "loses nothing."
        )
    if cost is not None:
        yield (
            f"A pass over {cost.num_tokens} tokens takes {1000 * cost.merged_seconds:.0f} ms with the merged model and "
            f"{1000 * cost.base_seconds:.0f} ms with the base model, on the worker's CPU."
        )

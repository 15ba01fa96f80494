"""`lorry batches`: files of inference requests."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.commands.files import upload_with_bar
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.tables import Column, date, listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorry.models import Batch

app = group("Run batch inference from JSONL files, at low priority.")
BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="ID of the batch, or a unique prefix of it.")]
SHOWN_ERRORS = 10


class Endpoint(StrEnum):
    """The endpoints of requests in a batch."""

    chat = "/v1/chat/completions"
    completions = "/v1/completions"


@app.verb(
    "create",
    "lorry batches create requests.jsonl",
    "lorry batches create requests.jsonl --endpoint /v1/completions -q",
    "lorry batches create file-3f2b",
)
def create(
    requests: Annotated[
        str, typer.Argument(metavar="FILE", help="JSONL file with one request per line, or the ID of an uploaded one.")
    ],
    endpoint: Annotated[Endpoint, typer.Option(help="Endpoint of all requests.")] = Endpoint.chat,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Create a batch. The requests are checked first; then each is answered within 24 hours."""
    lorry = client()
    path = Path(requests)
    if path.is_file():
        file_id = upload_with_bar(lorry, path, purpose="batch", reuses=True).id
    else:
        file_id = lookup.file(lorry, requests)
    batch = lorry.batches.create(input_file=file_id, endpoint=endpoint.value)
    if as_json:
        return output.print_json(batch.raw)
    if quiet:
        return output.print_ids([batch.id])
    return output.echo(f"Created batch {batch.id}. Show it with: lorry batches show {batch.id}")


@app.verb("list", "lorry batches list", "lorry batches list -q --limit 5")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of batches to list.")] = 20,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List batches, newest first."""
    columns = (
        Column("ID", "id"),
        Column("STATUS", "status"),
        Column("REQUESTS", _progress, priority=1),
        Column("ENDPOINT", "endpoint", priority=3),
        Column("CREATED", date("created_at"), priority=2),
    )
    empty = "No batches yet. Create one with `lorry batches create FILE`."
    listing(client().batches.list(limit=limit), columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb("show", "lorry batches show batch-3f2b", "lorry batches show batch-3f2b --json")
def show(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Show a batch's progress, its invalid lines and its output files."""
    lorry = client()
    batch = lorry.batches.get(lookup.batch(lorry, batch_id))
    output.print_facts(batch, _facts(batch), as_json=as_json)


@app.verb("cancel", "lorry batches cancel batch-3f2b", "lorry batches cancel batch-3f2b --yes")
def cancel(batch_id: BatchId, yes: Yes = False, as_json: AsJson = False) -> None:
    """Cancel a batch. Responses that are complete are kept."""
    lorry = client()
    batch_id = lookup.batch(lorry, batch_id)
    output.confirm(f"Cancel batch {batch_id}? This can't be undone.", yes=yes)
    batch = lorry.batches.cancel(batch_id)
    state = "cancelled" if batch.status == "cancelled" else "being cancelled"
    output.print_result(batch, f"Batch {batch.id} is {state}.", as_json=as_json)


def _progress(batch: Batch) -> str:
    counts = batch.request_counts
    failed = f", {counts['failed']} failed" if counts.get("failed") else ""
    return f"{counts.get('completed', 0)} of {counts.get('total', 0)}{failed}"


def _facts(batch: Batch) -> Iterator[tuple[str, object]]:
    yield "id", batch.id
    yield "status", batch.status
    yield "endpoint", batch.endpoint
    yield "completed", _progress(batch)
    yield "tokens", batch.usage.get("total_tokens")
    yield "input file", batch.input_file_id
    yield "output file", batch.output_file_id
    yield "error file", batch.error_file_id
    yield "created", output.when(batch.created_at or None)
    yield "expires", output.when(batch.expires_at or None)
    errors: list[dict[str, Any]] = batch.errors.get("data", [])
    for error in errors[:SHOWN_ERRORS]:
        yield f"line {error['line']}" if error.get("line") else "error", error.get("message")
    if len(errors) > SHOWN_ERRORS:
        yield "further errors", len(errors) - SHOWN_ERRORS

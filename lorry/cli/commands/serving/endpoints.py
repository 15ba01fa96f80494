"""`lorry serving`: inference servers that load adapters at run time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.app import client, group
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.tables import Column, date, listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorry.models import Deployment, ServingEndpoint

app = group("Manage serving endpoints: inference servers that load adapters at run time.")
Endpoint = Annotated[str, typer.Argument(metavar="ENDPOINT", help="Name or ID of the endpoint.")]


@app.verb(
    "add",
    "lorry serving add vllm-1 --base-model smollm2 --url http://127.0.0.1:8100 --adapter-folder /srv/adapters",
    "lorry serving add vllm-2 --base-model smollm2 --url https://vllm.example.com --adapter-folder /srv/adapters "
    "--max-rank 64 --api-key-file vllm.key",
)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to give the endpoint.")],
    *,
    base_model: Annotated[str, typer.Option(help="Base model that the server has loaded.")],
    url: Annotated[str, typer.Option(help="Address of the server, such as http://127.0.0.1:8100.")],
    adapter_folder: Annotated[
        Path, typer.Option(help="Folder that the service and the server see at the same path. Lorry writes to it.")
    ],
    max_rank: Annotated[int, typer.Option(min=1, help="The server's --max-lora-rank.")] = 16,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the server's own API key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Register a running vLLM server (operator key required). Its base model is verified in the background."""
    key = None if api_key_file is None else _key(api_key_file)
    folder = os.path.abspath(adapter_folder.expanduser())  # noqa: PTH100  (links stay as the server sees them)
    endpoint = client().serving.add(
        name, base_model=base_model, url=url, adapter_folder=folder, max_rank=max_rank, api_key=key
    )
    sentence = f"Registered {endpoint.name}. Check its state with: lorry serving show {endpoint.name}"
    output.print_result(endpoint, sentence, as_json=as_json)


@app.verb("list", "lorry serving list", "lorry serving list --json")
def list_(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the serving endpoints."""
    columns = (
        Column("NAME", "name"),
        Column("STATE", "state"),
        Column("BASE", "base_model"),
        Column("ERROR", "last_error", min_width=16),
        Column("MAX RANK", "max_rank", priority=2),
        Column("URL", "url", priority=1, min_width=16),
        Column("CHECKED", date("checked_at"), priority=3),
    )
    empty = "No serving endpoints yet. An operator registers one with `lorry serving add`."
    listing(client().serving.list(), columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb("show", "lorry serving show vllm-1", "lorry serving show vllm-1 --json")
def show(endpoint: Endpoint, as_json: AsJson = False) -> None:
    """Show an endpoint's state, last error and verification."""
    found = client().serving.get(endpoint)
    output.print_facts(found, _facts(found), as_json=as_json)


@app.verb("deployments", "lorry serving deployments vllm-1", "lorry serving deployments vllm-1 --json")
def deployments(endpoint: Endpoint, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the adapters of all projects on an endpoint (operator key required)."""
    columns = (
        Column("ADAPTER", "adapter"),
        Column("STATE", "state"),
        Column("ERROR", "last_error", min_width=16),
        Column("SINCE", date("updated_at"), priority=1),
    )
    empty = "No adapter is deployed on this endpoint."
    listing(client().serving.deployments(endpoint), columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb("remove", "lorry serving remove vllm-1", "lorry serving remove vllm-1 --yes")
def remove(endpoint: Endpoint, yes: Yes = False, as_json: AsJson = False) -> None:
    """Remove an endpoint and unload its adapters (operator key required).

    The built-in engine answers their requests. The server itself keeps running.
    """
    output.confirm(f"Remove serving endpoint {endpoint} and unload its adapters?", yes=yes)
    client().serving.remove(endpoint)
    output.print_deleted("serving endpoint", endpoint, as_json=as_json)


def verdict(verification: dict[str, Any] | None) -> str | None:
    """Return the result of a verification as a phrase."""
    if verification is None:
        return None
    passed = "passed" if verification.get("passed") else "failed"
    numbers = f"log-probabilities differ by {verification['max_diff']:.3g} (allowed: {verification['tolerance']:.3g})"
    blind = ", but the base model would pass too" if verification.get("distinguishes") is False else ""
    return f"{passed}: {numbers}{blind}"


def state_of(deployment: Deployment) -> str:
    """Return a deployment's endpoint, state, verification and last error as a line."""
    details = deployment.last_error or verdict(deployment.verification)
    return f"{deployment.endpoint}: {deployment.state}" + (f". {details}" if details else "")


def _facts(endpoint: ServingEndpoint) -> Iterator[tuple[str, object]]:
    yield "name", endpoint.name
    yield "id", endpoint.id
    yield "state", endpoint.state
    yield "last error", endpoint.last_error
    yield "verification", verdict(endpoint.verification)
    yield "base model", endpoint.base_model
    yield "served as", endpoint.served_model
    yield "base digest", endpoint.base_digest
    yield "kind", endpoint.kind
    yield "max rank", endpoint.max_rank
    yield "url", endpoint.url
    yield "adapter folder", endpoint.adapter_folder
    yield "api key", "stored" if endpoint.has_api_key else None
    yield "checked", output.when(endpoint.checked_at)
    yield "created", output.when(endpoint.created_at or None)


def _key(path: Path) -> str:
    try:
        key = path.expanduser().read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} can't be read: {error}.", param_hint="--api-key-file") from error
    if not key:
        raise typer.BadParameter(f"{path} is empty.", param_hint="--api-key-file")
    return key

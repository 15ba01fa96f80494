"""`lorry adapters deploy` and `undeploy`: adapters on serving endpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli import lookup
from lorry.cli.app import EXIT_INTERRUPTED, EXIT_REFUSED, client
from lorry.cli.commands.serving.endpoints import state_of
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, YesAccepted
from lorry.errors import LorryError

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.models import Deployment

DEPLOY_EXAMPLES = (
    "lorry adapters deploy support --to vllm-1",
    "lorry adapters deploy ftjob-3f2b --to vllm-1 --no-wait",
)
UNDEPLOY_EXAMPLES = ("lorry adapters undeploy support", "lorry adapters undeploy support --from vllm-1")
Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="Name or ID of the adapter, or a unique part of the name such as its suffix. Also the ID of its job.",
    ),
]


def deploy(
    adapter: Adapter,
    *,
    to: Annotated[str, typer.Option("--to", metavar="ENDPOINT", help="Name or ID of the serving endpoint.")],
    wait: Annotated[bool, typer.Option(help="Wait until the adapter is loaded and verified.")] = True,
    as_json: AsJson = False,
) -> None:
    """Load an adapter on a serving endpoint, which answers its requests from then on. Exits with 1 if that fails.

    Ctrl-C ends only the wait. The service continues the deployment.
    """
    lorry = client()
    found = lorry.adapters.deploy(lookup.adapter(lorry, adapter), to)
    if wait:
        found = _waited(lorry, found)
    output.print_result(found, f"{found.adapter} on {state_of(found)}", as_json=as_json)
    if found.state == "failed":
        raise typer.Exit(EXIT_REFUSED)


def undeploy(
    adapter: Adapter,
    *,
    endpoint: Annotated[
        str | None,
        typer.Option("--from", metavar="ENDPOINT", help="Name or ID of the endpoint (default: the only one)."),
    ] = None,
    _yes: YesAccepted = False,
    as_json: AsJson = False,
) -> None:
    """Unload an adapter from a serving endpoint. The built-in engine answers its requests from then on."""
    lorry = client()
    name = lookup.adapter(lorry, adapter)
    endpoint = endpoint or _only_endpoint(lorry, name)
    lorry.adapters.undeploy(name, endpoint)
    if as_json:
        output.print_json({"object": "adapter.deployment", "adapter": name, "endpoint": endpoint, "deleted": True})
    else:
        output.echo(f"Unloading {name} from {endpoint}.")


def _waited(lorry: Lorry, made: Deployment) -> Deployment:
    """Wait until the adapter is loaded or rejected. Prints each new reason why it is still pending."""
    try:
        with output.waiting(f"Deploying {made.adapter}") as report:
            told: set[str] = set()

            def show(deployment: Deployment) -> None:
                reason = deployment.last_error
                if deployment.state == "pending" and reason is not None and reason not in told:
                    told.add(reason)
                    output.echo(f"The deployment waits. {reason}")
                    output.echo(f"Details: lorry serving show {deployment.endpoint}")
                report(deployment)

            return lorry.adapters.wait_deployed(made.adapter, made.endpoint_id, on_progress=show)
    except KeyboardInterrupt:
        output.echo(f"The deployment on {made.endpoint} continues. To wait for it again, repeat the command.")
        output.echo(f"To undo it: lorry adapters undeploy {made.adapter} --from {made.endpoint}")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _only_endpoint(lorry: Lorry, name: str) -> str:
    found = [one.endpoint for one in lorry.adapters.deployments(name) if one.state != "removing"]
    if len(found) == 1:
        return found[0]
    if found:
        raise LorryError("ambiguous_endpoint", name=name, found=", ".join(found))
    raise LorryError("adapter_not_deployed", name=name)

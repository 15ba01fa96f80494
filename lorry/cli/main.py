"""Assembles the groups of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from lorry.cli.app import group, run
from lorry.cli.commands import (
    account,
    adapters,
    audit,
    down,
    files,
    fleet,
    jobs,
    keys,
    models,
    organizations,
    plans,
    projects,
    sweeps,
    up,
    usage,
    webhooks,
    worker,
    workers,
)
from lorry.cli.commands.inference import batches, chat
from lorry.cli.commands.serving import deployments, exports
from lorry.cli.commands.serving import endpoints as serving

app = group(
    "Fine-tune many LoRA adapters at once on your own machines.\n\n"
    "Commands connect to LORRY_URL with LORRY_API_KEY if set; otherwise to the service from `lorry login`; otherwise "
    "to `lorry up`.\n\n"
    "Exit codes: 0 success; 1 the service or a check failed; 2 wrong usage; 3 a signature was not checked; "
    "130 interrupted.",
    "lorry up",
    "lorry models add smollm2 HuggingFaceTB/SmolLM2-135M-Instruct",
    "lorry jobs submit smollm2 chats.jsonl --suffix support --watch",
    "lorry chat support",
    "lorry adapters pull support",
)
app.verb("up", *up.EXAMPLES)(up.up)
app.verb("down", *down.EXAMPLES)(down.down)
app.verb("status", *fleet.STATUS_EXAMPLES)(fleet.status)
app.verb("login", *account.LOGIN_EXAMPLES)(account.login)
app.verb("whoami", *account.WHOAMI_EXAMPLES)(account.whoami)
app.add_typer(models.app, name="models")
app.add_typer(files.app, name="files")
app.add_typer(plans.app, name="plans")
app.add_typer(jobs.app, name="jobs")
app.add_typer(sweeps.app, name="sweeps")
adapters.app.verb("deploy", *deployments.DEPLOY_EXAMPLES)(deployments.deploy)
adapters.app.verb("undeploy", *deployments.UNDEPLOY_EXAMPLES)(deployments.undeploy)
app.add_typer(exports.app, name="adapters")
app.verb("chat", *chat.EXAMPLES)(chat.chat)
app.add_typer(batches.app, name="batches")
app.add_typer(serving.app, name="serving")
app.verb("queue", *fleet.QUEUE_EXAMPLES)(fleet.queue)
app.verb("usage", *usage.EXAMPLES)(usage.usage)
app.add_typer(keys.app, name="keys")
app.add_typer(projects.app, name="projects")
app.add_typer(organizations.app, name="organizations")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(audit.app, name="audit")
app.add_typer(workers.app, name="workers")
app.verb("worker", *worker.EXAMPLES)(worker.worker)
app.verb("sign-in-link", *account.LINK_EXAMPLES)(account.sign_in_link)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lorry import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction] - typer calls it
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command `lorry`."""
    run(app)

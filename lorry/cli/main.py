"""Puts the groups of commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from lorry.cli.app import Sectioned, group, run
from lorry.cli.commands import (
    adapters,
    audit,
    files,
    fleet,
    jobs,
    keys,
    models,
    organizations,
    projects,
    sweeps,
    up,
    usage,
    webhooks,
    worker,
    workers,
)
from lorry.cli.commands.plan import plan

app = group(
    "Trains many LoRA adapters at once on the GPUs you own.\n\n"
    "Talks to the service that LORRY_URL and LORRY_API_KEY name, or to the local one that `lorry up` started.\n\n"
    "Exit codes: 0 done; 1 the service or a check refused; 2 wrong usage; 3 a signature was not checked; "
    "130 interrupted."
)
app.command("up")(up.up)
app.command("worker")(worker.worker)
app.add_typer(models.app, name="models")
app.add_typer(files.app, name="files")
app.command("plan", cls=Sectioned)(plan)
app.add_typer(jobs.app, name="jobs")
app.add_typer(sweeps.app, name="sweep")
app.add_typer(adapters.app, name="adapters")
app.add_typer(keys.app, name="keys")
app.add_typer(organizations.app, name="organizations")
app.add_typer(projects.app, name="projects")
app.add_typer(audit.app, name="audit")
app.add_typer(webhooks.app, name="webhooks")
app.command("usage")(usage.usage)
app.command("queue")(fleet.queue)
app.add_typer(workers.app, name="workers")
app.command("sign-in-link")(fleet.sign_in_link)


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
    """What the command `lorry` runs."""
    run(app)

"""`lorry down`: stops the service that `lorry up` started on a data folder."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.app import EXIT_REFUSED
from lorry.cli.render import output
from lorry.cli.render.output import AsJson

EXAMPLES = ("lorry down", "lorry down --data-dir /srv/lorry")
PATIENCE_SECONDS = 90.0
"""Longer than `lorry up` waits for its workers and its API server."""
POLL_SECONDS = 0.2


def down(
    data_dir: Annotated[
        Path | None, typer.Option(help="Data folder of the service (default: LORRY_DATA_DIR, else ~/.lorry).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Stop the local service. Jobs are saved and continue at the next start. Run it again to stop at once."""
    from lorry import connection
    from lorry.local import lock

    folder = (data_dir or connection.default_data_dir()).expanduser().resolve()
    pid = lock.holder(folder)
    if pid is not None:
        if not as_json:
            output.echo(f"Stopping the service in {folder} (process {pid}). Jobs are being saved …")
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while lock.holder(folder) == pid:
            if time.monotonic() > deadline:
                output.echo(f"Error: process {pid} is still running after {PATIENCE_SECONDS:g} s.")
                output.echo("Run `lorry down` again to stop it at once.")
                raise typer.Exit(EXIT_REFUSED)
            time.sleep(POLL_SECONDS)
    if as_json:
        output.print_json({"data_dir": str(folder), "stopped_pid": pid})
    else:
        output.echo("Stopped." if pid is not None else f"No service is running in {folder}.")

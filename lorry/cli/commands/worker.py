"""`lorry worker`: a node's workers, until they have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def worker(
    groups: Annotated[
        list[str] | None,
        typer.Option(
            "--groups",
            metavar="GROUP ...",
            help="A device group for each worker: GPUs by number as in 0,1 2 3; cpu; or cores as in cpu:0-3 cpu:4-7. "
            "Default: every GPU, else the CPU.",
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of what the workers keep. Default: LORRY_DATA_DIR, else ~/.lorry.")
    ] = None,
) -> None:
    """Run this node's workers for a service that runs already: one for each group of devices.

    Where the database, the broker and the store are is said by LORRY_DATABASE_URL, LORRY_REDIS_URL and
    LORRY_STORE_URL, as for the service itself. SIGTERM or Ctrl-C: they save their jobs, give them back and end; a
    second one ends them at once.
    """
    from lorry import connection
    from lorry.local import service

    if more and not groups:
        raise typer.BadParameter(f"say --groups before the device groups: lorry worker --groups {' '.join(more)}")
    service.check_installed()
    folder = (data_dir or connection.default_data_dir()).expanduser().resolve()
    service.become_workers(folder, [*(groups or []), *(more or [])])

"""`lorry worker`: runs the workers of a node until they exit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = ("lorry worker", "lorry worker --groups 0,1 2 3", "lorry worker --groups cpu:0-3 cpu:4-7")


def worker(
    groups: Annotated[
        list[str] | None,
        typer.Option(
            "--groups",
            metavar="GROUP ...",
            help="One device group per worker: GPU numbers as in 0,1 2 3; cpu; or cores as in cpu:0-3 cpu:4-7 "
            "(default: one worker per GPU, or the CPU).",
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the workers' caches (default: LORRY_DATA_DIR, else ~/.lorry).")
    ] = None,
) -> None:
    """Run the workers of this node for an existing service: one per device group.

    Connects to the service through LORRY_DATABASE_URL, LORRY_REDIS_URL and LORRY_STORE_URL. On SIGTERM or Ctrl-C the
    workers save and requeue their jobs and exit; a second signal stops them at once.
    """
    from lorry import connection
    from lorry.local import service

    if more and not groups:
        raise typer.BadParameter(f"pass --groups before the device groups: lorry worker --groups {' '.join(more)}")
    service.check_installed()
    folder = (data_dir or connection.default_data_dir()).expanduser().resolve()
    service.become_workers(folder, [*(groups or []), *(more or [])])

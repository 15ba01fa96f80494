"""`lorry up`: a whole service on this machine, until Ctrl-C."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli.app import EXIT_INTERRUPTED
from lorry.cli.render import output
from lorry.cli.render.output import AsJson

if TYPE_CHECKING:
    import httpx

    from lorry.connection import Connection
    from lorry.local.service import LocalService


def up(
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of everything that is kept. Default: LORRY_DATA_DIR, else ~/.lorry.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: 8472, or the next one that is free.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="cpu, or GPU numbers such as 0,1. Default: every GPU, else the CPU.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start the service: api, database, store and a worker per device. Ctrl-C drains and ends it."""
    from lorry import connection
    from lorry.local import devices as device_names
    from lorry.local import ports, privacy, service
    from lorry.local.lock import DataLock

    service.check_installed()
    chosen = device_names.choose(devices)
    folder = (data_dir or connection.default_data_dir()).expanduser().resolve()
    os.umask(0o077)  # all processes of the service inherit it
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (message := privacy.make_private(folder)) is not None:
        output.say(message)
    with DataLock(folder), ports.listen(host, port) as listening:
        if (told := ports.moved(listening, port)) is not None:
            output.say(told)
        running = service.LocalService(folder, host=host, listening=listening)
        running.logs.mkdir(mode=0o700, exist_ok=True)
        known = _bootstrap(running, ports.url(host, listening))
        num_signals = _supervise(running, known, chosen, as_json=as_json)
    if num_signals > 1:
        raise typer.Exit(EXIT_INTERRUPTED)


def _bootstrap(running: LocalService, url: str) -> Connection:
    """The connection file keeps the key of the first start; a later start renews the address and the identity secret.

    A key is shown only once. Where the file was lost, or the first start was cut off before it wrote it, another
    key is made: whoever has the data folder may.
    """
    from lorry import connection
    from lorry.errors import NotConfigured

    made = running.bootstrap()
    try:
        before = connection.read(running.data_dir)
    except NotConfigured as error:
        output.say(error.message)
        before = None
    api_key = made.api_key or (before.api_key if before else None)
    if api_key is None:
        api_key = running.new_key()
        output.say(f"{running.data_dir / connection.FILE_NAME} held no API key: a new one was made and is in there.")
    known = connection.Connection(url=url, api_key=api_key, identity_secret=made.identity_secret)
    connection.write(running.data_dir, known)
    return known


def _supervise(running: LocalService, known: Connection, devices: list[str], *, as_json: bool) -> int:
    from lorry.local.supervisor import ServiceSupervisor

    def announce() -> None:
        keep_key_good(running, known)
        link = running.sign_in_link()
        if as_json:
            output.print_json_line({"url": known.url, "sign_in_url": link, "data_dir": str(running.data_dir)})
        else:
            _announce(running, known.url, link, devices)

    return ServiceSupervisor(
        running.api(),
        running.workers(devices),
        is_ready=lambda: is_ready(known),
        on_ready=announce,
        say=output.say,
    ).run()


def keep_key_good(running: LocalService, known: Connection) -> None:
    """Replaces a key in the connection file that is no longer valid: it was revoked, or rotated elsewhere.

    Raises ServiceNotVerified, and then the key was not sent.
    """
    import httpx

    from lorry import connection

    try:
        with verified_client(known, seconds=10) as client:
            answer = client.get("/v1/browser_session", headers={"authorization": f"Bearer {known.api_key}"})
    except httpx.TransportError:
        return
    if answer.status_code == 401:
        connection.write(running.data_dir, replace(known, api_key=running.new_key()))
        path = running.data_dir / connection.FILE_NAME
        output.say(f"The API key in {path} is no longer valid. A new one was made and is in there.")


def _announce(running: LocalService, url: str, link: str, devices: list[str]) -> None:
    lines = (
        f"Lorry runs at {url}",
        f"  dashboard   {link}",
        "              (this link signs in once, within 15 minutes)",
        f"  data        {running.data_dir}",
        f"  devices     {', '.join(devices)}",
        f"  logs        {running.logs}",
        "Ctrl-C stops it; jobs go on at the next start." if os.isatty(0) else "SIGTERM stops it.",
    )
    out = output.console()
    for line in lines:
        out.print(line, soft_wrap=True)
    out.file.flush()


def is_ready(known: Connection) -> bool:
    """Whether our own API server answers. Raises ServiceNotVerified if another process answers in its place."""
    import httpx

    try:
        with verified_client(known, seconds=2) as client:
            return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def verified_client(known: Connection, *, seconds: float) -> httpx.Client:
    """Sends nothing but the challenge before the listener has proved that it is this installation's API server."""
    import httpx

    from lorry.transport.service_identity import VerifiedTransport

    assert known.identity_secret is not None, "bootstrap gives it"
    transport = VerifiedTransport(known.identity_secret)
    return httpx.Client(base_url=known.url, transport=transport, timeout=seconds, trust_env=False)

"""`lorry up`: runs a whole service on this machine, until Ctrl-C or `lorry down`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from lorry.cli.app import EXIT_INTERRUPTED, EXIT_REFUSED
from lorry.cli.render import output
from lorry.cli.render.output import AsJson

if TYPE_CHECKING:
    import httpx

    from lorry.cli.vllm import LocalVllm, VllmServer
    from lorry.connection import Connection
    from lorry.local.service import LocalService


EXAMPLES = (
    "lorry up",
    "lorry up --devices 0,1",
    "lorry up --serve vllm",
    "lorry up --detach --data-dir /srv/lorry",
)
FIRST_MODEL = "lorry models add smollm2 HuggingFaceTB/SmolLM2-135M-Instruct"


def up(
    *,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of all data of the service (default: LORRY_DATA_DIR, else ~/.lorry).")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on (default: 8472, or the next free one).")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="Devices to train on: cpu, or GPU numbers such as 0,1 (default: every GPU, else the CPU)."),
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="vllm[:BASE]",
            help="Also run vLLM for a base model (default: the only one), as the serving endpoint `local`.",
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Run in the background; `lorry down` stops the service.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start a service on this machine: API server, database, store and a worker per device. Ctrl-C stops it."""
    from lorry import connection
    from lorry.cli import vllm
    from lorry.local import devices as device_names
    from lorry.local import ports, privacy, service
    from lorry.local.lock import DataLock

    service.check_installed()
    chosen = device_names.choose(devices)
    served = None if serve is None else vllm.choose(serve)
    folder = (data_dir or connection.default_data_dir()).expanduser().resolve()
    os.umask(0o077)  # all processes of the service inherit it
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (message := privacy.make_private(folder)) is not None:
        output.echo(message)
    if detach:
        same = ["--host", host, *(["--port", str(port)] if port is not None else []), "--devices", ",".join(chosen)]
        same += ["--serve", serve] if serve is not None else []
        return _detach(folder, same, chosen, requested_port=port, as_json=as_json)
    with DataLock(folder), ports.listen(host, port) as listener:
        if (message := ports.moved(listener, port)) is not None:
            output.echo(message)
        running = service.LocalService(folder, host=host, listener=listener)
        running.logs.mkdir(mode=0o700, exist_ok=True)
        known = _bootstrap(running, ports.url(host, listener))
        server = None
        if served is not None:
            server = vllm.LocalVllm(folder, served, devices=chosen)
        num_signals = _supervise(running, known, chosen, server, as_json=as_json)
    if num_signals > 1:
        raise typer.Exit(EXIT_INTERRUPTED)
    return None


def _detach(
    folder: Path, arguments: list[str], devices: list[str], *, requested_port: int | None, as_json: bool
) -> None:
    """Start `lorry up` in a session of its own, and return when it is ready.

    It announces itself as JSON in a pipe, because the announcement has a sign-in link, which is secret. Its messages go
    to logs/up.log.
    """
    from lorry.local import ports
    from lorry.local.child import keep_short

    logs = folder / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)
    log = logs / "up.log"
    keep_short(log)
    argv = [sys.executable, "-P", "-m", "lorry", "up", "--json", "--data-dir", str(folder), *arguments]
    with log.open("ab") as messages:
        start = messages.tell()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            cwd=folder,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
    except KeyboardInterrupt:
        process.terminate()
        raise
    if not line:
        process.wait()
        output.echo(log.read_bytes()[start:].decode("utf-8", "replace").rstrip())
        raise typer.Exit(EXIT_REFUSED)
    ready: dict[str, str] = json.loads(line)
    if (message := ports.moved_to(urlsplit(ready["url"]).port or 0, requested_port)) is not None:
        output.echo(message)
    if as_json:
        output.print_json_line(ready)
    else:
        served = ready.get("served_base_model")
        _announce(folder, ready["url"], ready["sign_in_url"], devices, ready["next"], served=served, is_detached=True)


def _bootstrap(running: LocalService, url: str) -> Connection:
    """Write the connection file. It keeps the key of the first start, with the current address and identity secret.

    A key is shown only once. If the file was lost, or the first start was interrupted before it wrote the file, a new
    key is created: access to the data folder is enough for that.
    """
    from lorry import connection
    from lorry.errors import NotConfigured

    made = running.bootstrap()
    for warning in made.warnings:
        output.echo(f"Warning: {warning}")
    try:
        before = connection.read(running.data_dir)
    except NotConfigured as error:
        output.echo(error.message)
        before = None
    api_key = made.api_key or (before.api_key if before else None)
    if api_key is None:
        api_key = running.new_key()
        output.echo(f"{running.data_dir / connection.FILE_NAME} had no API key. A new key was created and saved there.")
    known = connection.Connection(url=url, api_key=api_key, identity_secret=made.identity_secret)
    connection.write(running.data_dir, known)
    return known


def _supervise(
    running: LocalService, known: Connection, devices: list[str], server: LocalVllm | None, *, as_json: bool
) -> int:
    from lorry.local.supervisor import ServiceSupervisor

    def announce() -> list[VllmServer]:
        """Returns vLLM's process, if it is to run."""
        replace_invalid_key(running, known)
        others = [] if server is None else [_register(running, server)]
        served = None if server is None else server.base
        link, command = running.sign_in_link(), _next_command(running.data_dir, known)
        if as_json:
            announcement = {"url": known.url, "sign_in_url": link, "data_dir": str(running.data_dir), "next": command}
            output.print_json_line(announcement | ({} if served is None else {"served_base_model": served}))
        else:
            _announce(running.data_dir, known.url, link, devices, command, served=served)
        return others

    return ServiceSupervisor(
        running.api(),
        running.workers(devices),
        is_ready=lambda: is_ready(known),
        on_ready=announce,
        report=output.echo,
    ).run()


def _register(running: LocalService, server: LocalVllm) -> VllmServer:
    """Register vLLM as a serving endpoint. Returns its process."""
    from lorry.cli import vllm
    from lorry.client import Lorry
    from lorry.errors import LorryError

    def fail(reason: str) -> None:
        output.echo(reason)
        try:
            with Lorry(data_dir=running.data_dir) as lorry:
                lorry.serving.report(vllm.ENDPOINT, error=reason)
        except LorryError as error:
            output.echo(f"Serving endpoint {vllm.ENDPOINT!r} does not show this. {error.sentence()}")

    with Lorry(data_dir=running.data_dir) as lorry:
        return server.register(lorry, fail=fail)


def replace_invalid_key(running: LocalService, known: Connection) -> None:
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
        output.echo(f"The API key in {path} is no longer valid. A new key was created and saved there.")


def _next_command(data_dir: Path, known: Connection) -> str:
    """Return a command to continue with: it adds a base model, or submits a job if there is one.

    Variables before the command make it use this service, if `lorry` finds another one by default.
    """
    import httpx

    from lorry import connection
    from lorry.errors import LorryError

    command = FIRST_MODEL
    with suppress(httpx.TransportError), verified_client(known, seconds=10) as client:
        key = connection.read(data_dir) or known
        answer = client.get("/v1/models", headers={"authorization": f"Bearer {key.api_key}"})
        models: list[dict[str, Any]] = answer.json().get("data") or [] if answer.is_success else []
        ready = [model for model in models if model.get("state") == "ready" and model.get("kind") == "base"]
        if ready:
            description: dict[str, Any] = ready[0].get("description") or {}
            rows = "chats" if description.get("has_chat_template", True) else "texts"
            command = f"lorry jobs submit {ready[0]['id']} {rows}.jsonl"
    try:
        is_found = connection.find().url == known.url
    except LorryError:
        is_found = False
    if is_found:
        return command
    no_url = "LORRY_URL= " if os.environ.get("LORRY_URL") else ""
    return f"{no_url}LORRY_DATA_DIR={shlex.quote(str(data_dir))} {command}"


def _announce(
    data_dir: Path,
    url: str,
    link: str,
    devices: list[str],
    command: str,
    *,
    served: str | None,
    is_detached: bool = False,
) -> None:
    """served: the base model that vLLM serves, if it runs."""
    if os.isatty(0) and not is_detached:
        stopping = "Press Ctrl-C to stop; jobs continue at the next start."
    else:
        stopping = "Stop the service with: lorry down" + (
            "" if data_dir == _default_folder() else f" --data-dir {shlex.quote(str(data_dir))}"
        )
    lines = [
        f"Lorry is running at {url}",
        f"  dashboard   {link}",
        "              (this link signs in once, within 15 minutes)",
        f"  data        {data_dir}",
        f"  devices     {', '.join(devices)}",
        f"  logs        {data_dir / 'logs'}",
        *([] if served is None else [f"  vLLM        starts for {served}; its state: lorry serving show local"]),
        f"Next{'' if is_detached else ', in another terminal'}: {command}",
        stopping,
    ]
    out = output.console()
    for line in lines:
        out.print(line, soft_wrap=True)
    out.file.flush()


def _default_folder() -> Path:
    from lorry import connection

    return connection.default_data_dir().expanduser().resolve()


def is_ready(known: Connection) -> bool:
    """Whether our own API server answers. Raises ServiceNotVerified if another process answers in its place."""
    import httpx

    try:
        with verified_client(known, seconds=2) as client:
            return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def verified_client(known: Connection, *, seconds: float) -> httpx.Client:
    """Return a client that sends only the challenge until the listener has proved its identity."""
    import httpx

    from lorry.transport.service_identity import VerifiedTransport

    assert known.identity_secret is not None, "bootstrap returns it"
    transport = VerifiedTransport(known.identity_secret)
    return httpx.Client(base_url=known.url, transport=transport, timeout=seconds, trust_env=False)

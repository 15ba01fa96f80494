"""`lorry login`, `lorry whoami` and `lorry sign-in-link`: the API key of this user and its browser sessions."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from lorry.cli.app import client
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.errors import LorryError

LOGIN_EXAMPLES = ("lorry login https://lorry.example.com", "lorry login https://lorry.example.com < key.txt")
WHOAMI_EXAMPLES = ("lorry whoami", "lorry whoami --json")
LINK_EXAMPLES = ("lorry sign-in-link", "lorry sign-in-link --open")


def login(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Address of the service, such as https://lorry.example.com.")
    ],
    as_json: AsJson = False,
) -> None:
    """Store the address and the API key of a service for later commands.

    Reads the key from a prompt, or from stdin if that is not a terminal. The service must accept the key. The file
    ~/.config/lorry/connection.json has mode 0600; delete it to log out. LORRY_URL, LORRY_API_KEY and LORRY_DATA_DIR
    take precedence.
    """
    from lorry import connection
    from lorry.resources.sign_in import SignInLinks
    from lorry.transport.http import Transport

    url = connection.normalize_url(url)
    key = _read_key()
    # As if LORRY_URL named it: a local service must prove its identity before it gets the key.
    found = connection.find(environ={**os.environ, "LORRY_URL": url, "LORRY_API_KEY": key})
    if urlsplit(url).scheme == "http" and not connection.is_loopback(url):
        output.echo(f"Warning: the connection to {url} is not encrypted. Anyone on the network can read the API key.")
    transport = Transport(found)
    try:
        identity = SignInLinks(transport).identity()
    finally:
        transport.close()
    folder = connection.login_dir()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = connection.write(folder, connection.Connection(url=url, api_key=key))
    if as_json:
        output.print_json({**identity, "url": url, "path": str(path)})
    else:
        output.echo(f"Logged in to {url} as {identity.get('key_name')} (project {identity.get('project')}).")
        output.echo(f"Stored the key in {path}.")
    for name in ("LORRY_URL", "LORRY_API_KEY", "LORRY_DATA_DIR"):
        if os.environ.get(name):
            output.echo(f"{name} is set and takes precedence. Unset it to use this login.")


def _read_key() -> str:
    is_prompted = output.is_interactive()
    key = typer.prompt("API key", hide_input=True, err=True) if is_prompted else sys.stdin.readline()
    if not key.strip():
        raise LorryError("no_key_entered" if is_prompted else "no_key_on_stdin")
    return key.strip()


def whoami(as_json: AsJson = False) -> None:
    """Show the service, project and rights of your API key."""
    lorry = client()
    identity: dict[str, Any] = lorry.sign_in_links.identity()
    if as_json:
        return output.print_json({**identity, "url": lorry.url})
    key_id = (lorry.api_key or "").split("_")[1:2]
    return output.pairs(
        (
            ("service", lorry.url),
            ("key", identity.get("key_name")),
            ("key id", key_id[0] if key_id else None),
            ("project", f"{identity.get('project')} ({identity.get('project_id')})"),
            ("operator", bool(identity.get("is_operator"))),
            ("scopes", " ".join(identity.get("scopes") or ())),
        )
    )


def sign_in_link(
    open_browser: Annotated[bool, typer.Option("--open", help="Open the link in a browser on this machine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create a link that signs one browser in to the dashboard, once, with the rights of your key."""
    link = client().sign_in_links.create()
    if as_json:
        output.print_json(link)
    else:
        output.console().print(link["url"], soft_wrap=True)
        output.echo(f"The link is valid once, until {output.when(link['expires_at'])}. Keep it secret.")
    if open_browser and not webbrowser.open(link["url"]):
        output.echo("No browser is available on this machine. Open the link manually.")

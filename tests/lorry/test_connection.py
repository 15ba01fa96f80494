"""Finding the service: arguments, environment variables and the connection file."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from lorry import connection
from lorry.connection import Connection
from lorry.errors import NotConfigured

SECRET = "5e" * 32


LOCAL, REMOTE = "http://127.0.0.1:8472", {"LORRY_URL": "http://b:2/v1", "LORRY_API_KEY": "remote"}
FOLDER: dict[str, Any] = {"data_dir": True}


@pytest.mark.parametrize(
    ("given", "environ", "url", "key"),
    [
        ({}, {}, LOCAL, "of the file"),
        ({}, REMOTE, "http://b:2", "remote"),
        ({}, {"LORRY_URL": f"{LOCAL}/v1"}, LOCAL, "of the file"),
        ({}, {"LORRY_URL": f"{LOCAL}/v1", "LORRY_API_KEY": "mine"}, LOCAL, "mine"),
        ({}, {"LORRY_URL": "http://127.0.0.1:8473"}, "http://127.0.0.1:8473", None),
        ({"api_key": "given"}, {"LORRY_URL": f"{LOCAL}/v1"}, LOCAL, "given"),
        ({"url": "http://a:1", "api_key": "x"}, REMOTE, "http://a:1", "x"),
        ({"url": "http://a:1"}, REMOTE, "http://a:1", None),
        ({"url": "http://b:2/"}, REMOTE, "http://b:2", "remote"),
        ({"url": "http://a:1"}, {"LORRY_API_KEY": "mine"}, "http://a:1", "mine"),
        (FOLDER, REMOTE, LOCAL, "of the file"),
        (FOLDER, {"LORRY_API_KEY": "remote"}, LOCAL, "of the file"),
    ],
)
def test_argument_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, given: dict[str, Any], environ: dict[str, str], url: str, key: str | None
) -> None:
    connection.write(tmp_path, Connection(url=LOCAL, api_key="of the file", identity_secret=SECRET))
    arguments = {**given, "data_dir": tmp_path} if given == FOLDER else given

    found = connection.find(**arguments, environ={"LORRY_DATA_DIR": str(tmp_path), **environ})

    assert (found.url, found.api_key) == (url, key)


def test_key_of_the_environment_is_not_used_for_a_folder_without_a_key(tmp_path: Path) -> None:
    connection.write(tmp_path, Connection(url=LOCAL, api_key=None, identity_secret=SECRET))

    assert connection.find(data_dir=tmp_path, environ=REMOTE).api_key is None


def test_origin_names_the_source_of_the_address(tmp_path: Path) -> None:
    local = {"LORRY_DATA_DIR": str(tmp_path)}
    remote = {**local, "LORRY_URL": "http://b:2/v1"}
    by_variable = connection.find(environ=remote).origin
    path = connection.write(tmp_path, Connection(url="http://127.0.0.1:8472", api_key="k", identity_secret=SECRET))

    assert by_variable == "The address comes from the variable LORRY_URL."
    assert connection.find(environ=local).origin == f"The address comes from {path}."
    assert connection.find(url="http://a:1", environ=remote).origin == ""
    assert connection.find(environ={**local, "LORRY_URL": "http://127.0.0.1:8472/"}).origin == by_variable
    assert connection.find(environ=remote).origin == (
        "The address comes from the variable LORRY_URL; without it, the address would be http://127.0.0.1:8472, "
        f"from {path}."
    )


def test_broken_file_is_ignored_if_the_variable_is_set(tmp_path: Path) -> None:
    (tmp_path / "connection.json").write_text("[]")

    assert connection.find(environ={"LORRY_DATA_DIR": str(tmp_path), "LORRY_URL": "http://b:2"}).url == "http://b:2"


def test_missing_connection_error_names_lorry_up(tmp_path: Path) -> None:
    with pytest.raises(NotConfigured) as refused:
        connection.find(environ={"LORRY_DATA_DIR": str(tmp_path)})

    assert refused.value.code == "not_configured"
    assert "lorry up" in refused.value.remedy


@pytest.mark.parametrize(
    "content",
    [
        *('{"url": "a"}', "", "[]", "{", '{"url": 3}', '{"url": "http://a", "api_key": 3}', "\udcff"),
        *('{"url": "http://a", "identity_secret": 3}', '{"url": "http://a", "identity_secret": "short"}'),
    ],
)
def test_invalid_connection_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "connection.json").write_bytes(content.encode("utf-8", "surrogateescape"))

    with pytest.raises(NotConfigured, match=r"connection\.json") as refused:
        connection.find(environ={"LORRY_DATA_DIR": str(tmp_path)})
    assert f"`lorry down --data-dir {tmp_path}`" in refused.value.remedy


def test_unreadable_connection_file_is_not_replaced_by_a_restart(tmp_path: Path) -> None:
    (tmp_path / "connection.json").mkdir()

    with pytest.raises(NotConfigured, match=r"connection\.json can't be read: Is a directory\.") as refused:
        connection.find(environ={"LORRY_DATA_DIR": str(tmp_path)})
    assert "lorry down" not in refused.value.remedy


def test_file_is_private_even_if_it_replaces_a_readable_one(tmp_path: Path) -> None:
    (tmp_path / "connection.json").write_text("{}")
    (tmp_path / "connection.json").chmod(0o644)

    path = connection.write(tmp_path, Connection(url="http://127.0.0.1:1", api_key="k", identity_secret=SECRET))

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["connection.json"]


@pytest.mark.parametrize("url", ["", "127.0.0.1:8472", "ftp://a", "http://", "http://a:99999", "http://[::1"])
def test_invalid_address_is_rejected(url: str) -> None:
    with pytest.raises(NotConfigured, match="not a valid service address"):
        connection.normalize_url(url)


def test_invalid_address_in_the_environment_names_the_variable() -> None:
    with pytest.raises(NotConfigured, match=r"LORRY_URL is '127\.0\.0\.1', which is not a valid") as refused:
        connection.find(environ={"LORRY_URL": "127.0.0.1"})
    assert refused.value.remedy.startswith("Set LORRY_URL to")


def test_missing_connection_error_fits_the_source_of_the_folder(tmp_path: Path) -> None:
    remedies = list[str]()
    for explicit, environ in ((tmp_path, {}), (None, {"LORRY_DATA_DIR": str(tmp_path)})):
        with pytest.raises(NotConfigured, match=r"connection\.json does not exist") as refused:
            connection.find(data_dir=explicit, environ=environ)
        remedies.append(refused.value.remedy)

    assert all(f"`lorry up --data-dir {tmp_path}`" in remedy for remedy in remedies)
    assert ["LORRY_DATA_DIR" in remedy for remedy in remedies] == [False, True]


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:1", True),
        ("http://localhost:1", True),
        ("http://[::1]:1", True),
        ("http://10.0.0.1", False),
        ("https://localhost.example", False),
    ],
)
def test_only_a_loopback_address_is_local(url: str, local: bool) -> None:
    assert connection.is_loopback(url) is local


def test_file_without_an_identity_secret_gives_no_key(tmp_path: Path) -> None:
    connection.write(tmp_path, Connection(url="http://127.0.0.1:8472", api_key="k"))
    local = {"LORRY_DATA_DIR": str(tmp_path)}

    for environ in (local, {**local, "LORRY_URL": "http://127.0.0.1:8472"}):
        with pytest.raises(NotConfigured, match="no identity_secret") as refused:
            connection.find(environ=environ)
        assert f"`lorry up --data-dir {tmp_path}`" in refused.value.remedy
    elsewhere = {**local, "LORRY_URL": "http://127.0.0.1:9", "LORRY_API_KEY": "mine"}
    assert connection.find(environ=elsewhere).api_key == "mine"


def test_secret_of_the_file_applies_to_its_address_and_is_not_printed(tmp_path: Path) -> None:
    connection.write(tmp_path, Connection(url="http://127.0.0.1:8472", api_key="of-the-file", identity_secret=SECRET))
    local = {"LORRY_DATA_DIR": str(tmp_path)}

    found = connection.find(environ=local)

    assert found.identity_secret == SECRET
    assert connection.find(environ={**local, "LORRY_URL": "http://127.0.0.1:8472/v1"}).identity_secret == SECRET
    assert connection.find(environ={**local, "LORRY_URL": "http://127.0.0.1:8473"}).identity_secret is None
    assert connection.find(url="http://127.0.0.1:8472", environ=local).identity_secret is None
    assert SECRET not in repr(found)
    assert "of-the-file" not in repr(found)


def test_explicit_key_works_with_a_file_without_an_identity_secret(tmp_path: Path) -> None:
    connection.write(tmp_path, Connection(url="http://127.0.0.1:8472", api_key="of-the-file"))
    local = {"LORRY_DATA_DIR": str(tmp_path), "LORRY_URL": "http://127.0.0.1:8472"}

    assert connection.find(environ={**local, "LORRY_API_KEY": "mine"}).api_key == "mine"
    assert connection.find(environ=local, api_key="given").api_key == "given"


def test_login_overrides_the_data_folder_and_the_environment_overrides_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path / ".lorry", tmp_path / "named", tmp_path / ".config" / "lorry"):
        folder.mkdir(parents=True)
    connection.write(tmp_path / ".lorry", Connection(url="http://127.0.0.1:1", api_key="up", identity_secret=SECRET))
    connection.write(tmp_path / "named", Connection(url="http://127.0.0.1:2", api_key="named", identity_secret=SECRET))
    path = connection.write(tmp_path / ".config" / "lorry", Connection(url="https://lorry.example", api_key="login"))

    found = connection.find(environ={})
    assert found == Connection(url="https://lorry.example", api_key="login")
    assert found.origin == (
        f"The address comes from {path}, which `lorry login` wrote; without it, the address would be "
        f"http://127.0.0.1:1, from {tmp_path / '.lorry' / 'connection.json'}."
    )
    assert connection.find(environ={"LORRY_API_KEY": "mine"}) == Connection(url="https://lorry.example", api_key="mine")
    assert connection.find(environ={"LORRY_DATA_DIR": str(tmp_path / "named")}).api_key == "named"
    assert connection.find(data_dir=tmp_path / ".lorry", environ={}).api_key == "up"
    by_url = {"LORRY_URL": "https://other.example"}
    assert connection.find(environ=by_url) == Connection(url="https://other.example", api_key=None)
    path.unlink()
    assert connection.find(environ={}).api_key == "up"


def test_the_key_of_a_login_is_sent_where_the_variable_names_the_same_service(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "LORRY_DATA_DIR": str(tmp_path / "none")}
    (tmp_path / "lorry").mkdir()
    connection.write(tmp_path / "lorry", Connection(url="https://lorry.example", api_key="login"))

    assert connection.find(environ={**environ, "LORRY_URL": "https://lorry.example/v1"}).api_key == "login"
    assert connection.find(environ={**environ, "LORRY_URL": "https://other.example"}).api_key is None


def test_a_broken_login_is_refused_by_name_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "lorry").mkdir()
    (tmp_path / "lorry" / "connection.json").write_text("[]")

    with pytest.raises(NotConfigured, match=r"lorry/connection\.json") as refused:
        connection.find(environ={"XDG_CONFIG_HOME": str(tmp_path)})
    assert "`lorry login URL`" in refused.value.remedy

"""API keys, sign-in links and browser sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from sqlalchemy import inspect, select, update
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.errors import InvalidRequest, LorryError, OutOfSpace, Unauthorized, Unavailable
from catalog.pepper import Pepper
from catalog.tables.tenancy import ApiKey
from catalog.tenancy import authentication, projects
from tests.catalog.world import PEPPER, World


def new_key(world: World, **given: object) -> tuple[ApiKey, str]:
    return authentication.create(world.db, project_id=world.caller.project_id, name="ci", pepper=PEPPER, **given)  # type: ignore[arg-type]


def test_key_authenticates_for_its_own_project(world: World) -> None:
    key, secret = new_key(world, is_operator=True)

    caller = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)

    assert secret.startswith(f"lorry_{key.id}_")
    assert len(secret.rpartition(f"{key.id}_")[2]) == 43
    assert (caller.api_key_id, caller.project_name, caller.is_operator, caller.name) == (key.id, "ours", True, "ci")


def test_no_column_holds_a_secret(world: World) -> None:
    key, secret = new_key(world)

    kept = [str(getattr(key, column.key)) for column in inspect(ApiKey).columns]
    assert not any(secret.partition(f"{key.id}_")[2] in value for value in kept)


@pytest.mark.parametrize("spoil", [lambda s: s[:-1] + "!", lambda s: "", lambda s: "lorry_", lambda s: s + "é\ud800"])
def test_wrong_key_is_rejected(world: World, spoil: Callable[[str], str]) -> None:
    _, secret = new_key(world)

    with pytest.raises(Unauthorized):
        authentication.authenticate(world.db, secret=spoil(secret), pepper=PEPPER)
    with pytest.raises(Unauthorized):
        authentication.authenticate(world.db, secret=secret, pepper=Pepper(current=b"q" * 32))


def test_key_is_compared_in_constant_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    key, secret = new_key(world)
    compared: list[tuple[str, str]] = []

    def differs(a: str, b: str) -> bool:
        compared.append((a, b))
        return False

    monkeypatch.setattr("catalog.tenancy.authentication.hmac.compare_digest", differs)
    with pytest.raises(Unauthorized):
        authentication.authenticate(world.db, secret=secret, pepper=PEPPER)

    assert compared == [(key.digest, key.digest)]


def test_last_use_is_recorded_once_a_minute(world: World) -> None:
    key, secret = new_key(world)

    def used_after(seconds: float) -> float | None:
        world.clock.advance(seconds)
        authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
        with world.db.read() as session:
            return session.scalar(select(ApiKey.last_used_at).where(ApiKey.id == key.id))

    first, soon, later = used_after(0), used_after(30), used_after(40)

    assert first == soon
    assert later != soon


def test_key_is_valid_while_another_writer_locks_the_database(world: World) -> None:
    key, secret = new_key(world)
    with world.db.write() as session:
        session.execute(update(ApiKey).where(ApiKey.id == key.id).values(name="renamed"))

        caller = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)

    assert caller.api_key_id == key.id
    authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
    with world.db.read() as session:
        assert session.get_one(ApiKey, key.id).last_used_at == world.clock.now


@pytest.mark.parametrize("trouble", [OutOfSpace, Unavailable])
def test_key_is_valid_while_the_database_cannot_be_written(
    world: World, monkeypatch: pytest.MonkeyPatch, trouble: type[LorryError]
) -> None:
    key, secret = new_key(world)

    @contextmanager
    def refusing(_: Database) -> Iterator[Session]:
        raise trouble("database_unavailable")
        yield

    monkeypatch.setattr(Database, "write", refusing)
    monkeypatch.setattr(Database, "write_briefly", refusing)

    assert authentication.authenticate(world.db, secret=secret, pepper=PEPPER).api_key_id == key.id


def test_sign_in_link_opens_one_browser_session_once(world: World) -> None:
    link = authentication.create_sign_in_link(world.db, api_key_id=world.caller.api_key_id, pepper=PEPPER)

    def exchange(_: int) -> str | None:
        try:
            return authentication.exchange_sign_in(world.db, token=link, pepper=PEPPER)
        except Unauthorized:
            return None

    with ThreadPoolExecutor(4) as pool:
        opened = [secret for secret in pool.map(exchange, range(8)) if secret]

    assert len(opened) == 1
    visitor = authentication.authenticate_browser(world.db, secret=opened[0], pepper=PEPPER)
    assert visitor.is_browser
    assert visitor.expires_at == pytest.approx(world.clock.now + 12 * 3600, abs=1)
    assert replace(visitor, is_browser=False, expires_at=None) == world.caller
    authentication.end_browser(world.db, secret=opened[0], pepper=PEPPER)
    with pytest.raises(Unauthorized):
        authentication.authenticate_browser(world.db, secret=opened[0], pepper=PEPPER)


def test_links_and_browser_sessions_expire(world: World) -> None:
    late = authentication.create_sign_in_link(world.db, api_key_id=world.caller.api_key_id, pepper=PEPPER, seconds=900)
    world.clock.advance(901)
    with pytest.raises(Unauthorized) as refusal:
        authentication.exchange_sign_in(world.db, token=late, pepper=PEPPER)
    assert "python -m api sign-in-link" in refusal.value.remedy

    link = authentication.create_sign_in_link(world.db, api_key_id=world.caller.api_key_id, pepper=PEPPER)
    browser = authentication.exchange_sign_in(world.db, token=link, pepper=PEPPER)
    world.clock.advance(12 * 3600 + 1)
    with pytest.raises(Unauthorized):
        authentication.authenticate_browser(world.db, secret=browser, pepper=PEPPER)


def test_project_is_created_once_and_its_name_is_validated(world: World) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = {project.id for project in pool.map(lambda _: projects.ensure(world.db, "new"), range(8))}

    assert len(made) == 1
    for name in ("", "a/b", "a b", "é", "x" * 65, "a\n"):
        with pytest.raises(InvalidRequest):
            projects.ensure(world.db, name)

"""The pepper is created once, never replaces a lost one, and rotates without invalidating anything."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from catalog import pepper
from catalog.errors import Conflict, InvalidRequest, Unauthorized
from catalog.pepper import Pepper
from catalog.settings import Settings
from catalog.tables.tenancy import ApiKey
from catalog.tenancy import authentication
from catalog.webhooks import endpoints, signing
from tests.catalog.hooks import Hooks
from tests.catalog.world import PEPPER, World

OLD, NEW = PEPPER.current, b"n" * 32
ROTATING = Pepper(current=NEW, previous=OLD)
AFTER = Pepper(current=NEW)


def settings(tmp_path: Path, **given: str) -> Settings:
    return Settings(data_dir=tmp_path, **{name: SecretStr(value) for name, value in given.items()})  # pyright: ignore[reportArgumentType]


def without_keys(world: World) -> World:
    with world.db.write() as session:
        for key in session.scalars(select(ApiKey)):
            session.delete(key)
    return world


def test_concurrent_processes_create_one_private_pepper(world: World, tmp_path: Path) -> None:
    without_keys(world)
    chosen = settings(tmp_path / "data")

    with ThreadPoolExecutor(4) as pool:
        loaded = set(pool.map(lambda _: pepper.load(chosen, world.db).current, range(8)))

    assert len(loaded) == 1
    assert bytes.fromhex(loaded.pop().decode())
    assert stat.S_IMODE((tmp_path / "data" / "pepper").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["pepper"]


def test_new_pepper_and_its_new_folders_are_synced(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_keys(world)
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)

    pepper.load(settings(tmp_path / "new" / "data"), world.db)

    assert str(tmp_path) in synced, "the entry of the folder `new`"
    assert str(tmp_path / "new") in synced
    assert synced[-1] == str(tmp_path / "new" / "data"), "the entry of the pepper, last of all"


def test_pepper_is_not_created_while_keys_exist(world: World, tmp_path: Path) -> None:
    with pytest.raises(Conflict) as refused:
        pepper.load(settings(tmp_path), world.db)

    assert refused.value.code == "invalid_pepper"
    assert str(tmp_path / "pepper") in refused.value.message
    assert "LORRY_PEPPER" in refused.value.remedy
    assert not (tmp_path / "pepper").exists()


def test_settings_override_the_file_and_a_damaged_file_is_reported(world: World, tmp_path: Path) -> None:
    (tmp_path / "pepper").write_bytes(b"short")

    assert pepper.load(settings(tmp_path, pepper="g" * 32), world.db) == Pepper(current=b"g" * 32)
    with pytest.raises(InvalidRequest, match="damaged") as refused:
        pepper.load(settings(tmp_path), world.db)
    assert str(tmp_path / "pepper") in refused.value.message
    assert "its length is 5" in refused.value.message
    assert "openssl rand" in refused.value.remedy


def test_damaged_previous_pepper_may_be_deleted(world: World, tmp_path: Path) -> None:
    (tmp_path / "pepper.previous").write_bytes(b"x")

    with pytest.raises(InvalidRequest, match=r"pepper\.previous is damaged: its length is 1, but") as refused:
        pepper.load(settings(tmp_path, pepper="g" * 32), world.db)

    assert "or delete the file" in refused.value.remedy


@pytest.mark.parametrize(
    ("weak", "remedy"),
    [
        ("x" * 31, "Set a random value"),
        ("é" * 15, "Set a random value"),
        (f"{'x' * 32}\n", "Remove the whitespace."),
        (f" {'x' * 32}", "Remove the whitespace."),
    ],
)
def test_weak_pepper_is_rejected(world: World, tmp_path: Path, weak: str, remedy: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        pepper.load(settings(tmp_path, pepper=weak), world.db)

    assert refused.value.code == "invalid_pepper"
    assert refused.value.remedy.startswith(remedy)


def test_empty_pepper_is_rejected_without_replacing_the_file(world: World, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="LORRY_PEPPER is empty") as refused:
        pepper.load(settings(tmp_path, pepper=""), world.db)

    assert refused.value.code == "invalid_pepper"
    assert "unset LORRY_PEPPER" in refused.value.remedy


def test_previous_pepper_is_used_verbatim_and_an_empty_one_is_ignored(world: World, tmp_path: Path) -> None:
    loaded = pepper.load(settings(tmp_path, pepper="g" * 32, previous_pepper="short \n"), world.db)

    assert loaded.previous == b"short \n"
    assert pepper.load(settings(tmp_path, pepper="g" * 32, previous_pepper=""), world.db).previous is None


def test_pepper_file_is_rotated_by_renaming_it(world: World, tmp_path: Path) -> None:
    (tmp_path / "pepper.previous").write_bytes(OLD)

    loaded = pepper.load(settings(tmp_path), world.db)

    assert loaded.previous == OLD
    assert loaded.current == (tmp_path / "pepper").read_bytes() != OLD


def test_pepper_is_not_in_its_repr() -> None:
    assert repr(ROTATING) == "Pepper()"


def test_key_used_during_a_rotation_stays_valid_after_it(world: World) -> None:
    (used, used_secret), (unused, unused_secret) = (
        authentication.create(world.db, project_id=world.caller.project_id, name=name, pepper=PEPPER)
        for name in ("a", "b")
    )

    during = authentication.authenticate(world.db, secret=used_secret, pepper=ROTATING)
    after = authentication.authenticate(world.db, secret=used_secret, pepper=AFTER)

    assert during.api_key_id == after.api_key_id == used.id
    with pytest.raises(Unauthorized):
        authentication.authenticate(world.db, secret=unused_secret, pepper=AFTER)
    assert authentication.authenticate(world.db, secret=unused_secret, pepper=ROTATING).api_key_id == unused.id
    with pytest.raises(Unauthorized):
        authentication.authenticate(world.db, secret=used_secret, pepper=PEPPER)


def test_key_created_during_a_rotation_uses_the_new_pepper(world: World) -> None:
    key, secret = authentication.create(world.db, project_id=world.caller.project_id, name="a", pepper=ROTATING)

    assert authentication.authenticate(world.db, secret=secret, pepper=AFTER).api_key_id == key.id


def test_links_and_browser_sessions_outlive_a_rotation(world: World) -> None:
    links = [
        authentication.create_sign_in_link(world.db, api_key_id=world.caller.api_key_id, pepper=PEPPER)
        for _ in range(2)
    ]
    browser = authentication.exchange_sign_in(world.db, token=links[0], pepper=PEPPER)

    opened = authentication.exchange_sign_in(world.db, token=links[1], pepper=ROTATING)

    assert authentication.authenticate_browser(world.db, secret=browser, pepper=ROTATING).is_browser
    assert authentication.authenticate_browser(world.db, secret=opened, pepper=AFTER).is_browser
    authentication.end_browser(world.db, secret=browser, pepper=ROTATING)
    with pytest.raises(Unauthorized):
        authentication.authenticate_browser(world.db, secret=browser, pepper=ROTATING)


def test_webhook_secrets_stay_valid_until_they_are_rotated(world: World) -> None:
    hooks = Hooks(world)
    now = world.clock.now

    assert signing.good(hooks.endpoint(), ROTATING, now=now) == [hooks.secret]
    _, rotated = endpoints.rotate(world.db, **hooks.ident, overlap_seconds=60, pepper=ROTATING)

    assert signing.good(hooks.endpoint(), ROTATING, now=now) == [rotated, hooks.secret]
    assert signing.current(hooks.endpoint(), AFTER) == rotated

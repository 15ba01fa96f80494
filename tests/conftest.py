"""Session fixtures of the real servers and the real model that tests use, and of an empty database to copy. A server
starts on first use and ends with the session.

Where one can't be had, the tests that ask for it are skipped and counted at the end; under CI=true they fail.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from catalog.db.database import Database
from tests.next_migration import install
from tests.services import statements
from tests.services.chromium import chromium_program
from tests.services.gguf import real_model
from tests.services.postgres import ON_POSTGRESQL, empty_database, postgres_server
from tests.services.programs import Missing
from tests.services.redis import redis_server
from tests.services.s3 import s3_server

NEEDS = "needs "
"""How the reason of such a skip begins."""
NewDatabase = Callable[[], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with every table and no row, to copy."""
    path = tmp_path_factory.mktemp("migrated") / "lorry.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server for this session: postgresql+psycopg://lorry@127.0.0.1:PORT/postgres."""
    with _or_skip("PostgreSQL"), postgres_server() as url:
        yield url


@pytest.fixture
def new_postgres_url(postgres_url: str) -> Iterator[str]:
    """An empty database on that server, for one test."""
    with empty_database(postgres_url, f"test_{secrets.token_hex(6)}") as url:
        yield url


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> Iterator[str]:
    """The name of a database on that server with every table and no row, to copy."""
    with empty_database(postgres_url, "migrated") as url:
        database = Database(url)
        database.migrate()
        database.close()
        yield "migrated"


@pytest.fixture
def migrated_postgres_url(postgres_url: str, postgres_template: str) -> Iterator[str]:
    """A database with every table and no row, for one test."""
    with empty_database(postgres_url, f"test_{secrets.token_hex(6)}", template=postgres_template) as url:
        yield url


@pytest.fixture
def next_migration(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process has one migration more than the code: the folder of its scripts, whose newest is NEXT."""
    return install(tmp_path_factory.mktemp("next") / "scripts", monkeypatch)


@pytest.fixture
def service_database(request: pytest.FixtureRequest) -> Iterator[None]:
    """Services that the test starts as processes have the database that the tests are to run on."""
    with _service_database(request):
        yield


@pytest.fixture(scope="module")
def module_database(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for all tests of a module together."""
    with _service_database(request):
        yield


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server for this session: redis://127.0.0.1:PORT/0."""
    with _or_skip("Redis"), redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server for this session: http://127.0.0.1:PORT. Make a bucket with tests.services.s3.new_bucket."""
    with _or_skip("S3 server"), s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def chromium_path() -> Path:
    """The program of a Chromium on this machine."""
    with _or_skip("Chromium"):
        return chromium_program()
    raise AssertionError("unreachable")


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The GGUF file of a real language model, SmolLM2-135M-Instruct."""
    with _or_skip("real base model"):
        return real_model()
    raise AssertionError("unreachable")


def pytest_configure() -> None:
    """Statements are shared; and a shell that starts tests in the background has them ignore Ctrl-C, and so would the
    programs that they start."""
    statements.share()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before those that `-m` deselects are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`slow_repetitions`: the first case of a parametrized test is fast, and its other cases are slow."""
    seen: set[str] = set()
    for item in items:
        if item.get_closest_marker("slow_repetitions"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker("slow")
            seen.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: to look for garbage among it takes half of the time in which tests are collected."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests that were skipped for want of a server."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    missing = Counter(str(reason).removeprefix("Skipped: ") for reason in reasons if NEEDS in str(reason))
    if missing:
        terminalreporter.section("skipped for want of a server")
        for reason, number in missing.most_common():
            terminalreporter.line(f"{number} tests: {reason}")


@contextmanager
def _service_database(request: pytest.FixtureRequest) -> Iterator[None]:
    if not ON_POSTGRESQL:
        yield
        return
    server, template = (request.getfixturevalue(name) for name in ("postgres_url", "postgres_template"))
    name = f"service_{secrets.token_hex(6)}"
    with empty_database(server, name, template=template) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORRY_DATABASE_URL", url)
        yield


@contextmanager
def _or_skip(name: str) -> Iterator[None]:
    try:
        yield
    except Missing as missing:
        reason = f"{NEEDS}{name}: {missing}"
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)

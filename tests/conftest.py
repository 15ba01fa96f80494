"""Session fixtures: real servers, a real model, and an empty database to copy.

A server starts on first use and ends with the session. If it is not available, the tests that need it are skipped and
counted at the end; under CI=true they fail.
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
from hypothesis import settings

from catalog.db.database import Database
from tests.next_migration import install
from tests.services import statements
from tests.services.chromium import chromium_program
from tests.services.gguf import real_model
from tests.services.postgres import ON_POSTGRESQL, empty_database, postgres_server
from tests.services.programs import Missing
from tests.services.redis import redis_server
from tests.services.s3 import s3_server
from tests.suspension import Suspension

settings.register_profile("lorry", deadline=None)
settings.load_profile("lorry")  # a deadline would make tests depend on elapsed time

NEEDS = "needs "
"""The prefix of the skip reason of a test that needs a missing program."""
NewDatabase = Callable[[], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a SQLite file with every table and no rows, to copy."""
    path = tmp_path_factory.mktemp("migrated") / "lorry.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Start a PostgreSQL server for the session: postgresql+psycopg://lorry@127.0.0.1:PORT/postgres."""
    with _or_skip("PostgreSQL"), postgres_server() as url:
        yield url


@pytest.fixture
def new_postgres_url(postgres_url: str) -> Iterator[str]:
    """Create an empty database on that server for one test."""
    with empty_database(postgres_url, f"test_{secrets.token_hex(6)}") as url:
        yield url


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> Iterator[str]:
    """Create a database on that server with every table and no rows, to copy. Yields its name."""
    with empty_database(postgres_url, "migrated") as url:
        database = Database(url)
        database.migrate()
        database.close()
        yield "migrated"


@pytest.fixture
def migrated_postgres_url(postgres_url: str, postgres_template: str) -> Iterator[str]:
    """Create a database with every table and no rows for one test."""
    with empty_database(postgres_url, f"test_{secrets.token_hex(6)}", template=postgres_template) as url:
        yield url


@pytest.fixture
def next_migration(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give this process one migration more than the code has. Returns the folder of the scripts; the newest is NEXT."""
    return install(tmp_path_factory.mktemp("next") / "scripts", monkeypatch)


@pytest.fixture
def suspension(monkeypatch: pytest.MonkeyPatch) -> Suspension:
    return Suspension(monkeypatch)


@pytest.fixture
def service_database(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the services that the test starts as processes on the database of this test run."""
    with _service_database(request):
        yield


@pytest.fixture(scope="module")
def module_database(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the services that the tests of a module start on one database of this test run."""
    with _service_database(request):
        yield


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Start a Redis server for the session: redis://127.0.0.1:PORT/0."""
    with _or_skip("Redis"), redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Start an S3 server for the session: http://127.0.0.1:PORT. tests.services.s3.new_bucket creates a bucket."""
    with _or_skip("S3 server"), s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def chromium_path() -> Path:
    """Return the program of a Chromium on this machine."""
    with _or_skip("Chromium"):
        return chromium_program()
    raise AssertionError("unreachable")


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Return the GGUF file of a real language model, SmolLM2-135M-Instruct."""
    with _or_skip("real base model"):
        return real_model()
    raise AssertionError("unreachable")


def pytest_configure() -> None:
    """Share compiled statements between tests, and restore Ctrl-C.

    A shell that starts the tests in the background makes them ignore SIGINT, and the programs that they start as well.
    """
    statements.share()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects tests by `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of a `slow_repetitions` test as slow, except the first one."""
    seen: set[str] = set()
    for item in items:
        if item.get_closest_marker("slow_repetitions"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker("slow")
            seen.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable garbage collection while tests are collected.

    Scanning the imported modules for garbage would take half of the time. They stay in memory anyway, so they are
    frozen.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests that were skipped because a server is missing."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    missing = Counter(str(reason).removeprefix("Skipped: ") for reason in reasons if NEEDS in str(reason))
    if missing:
        terminalreporter.section("skipped without a server")
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

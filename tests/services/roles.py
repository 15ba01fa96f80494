"""Database roles in tests: on PostgreSQL, code runs under the role that calls it in a service.

A connection gets its role when it leaves the pool, according to the call stack. Functions that only workers call run as
the worker. All other code of the catalog and the API runs as the API server. Statements of the test itself run as the
owner. A right that catalog/tables/privileges.py lacks therefore fails every test that needs it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from sqlalchemy import Engine, event

from catalog.tables.privileges import API_ROLE, WORKER_ROLE

ROOT = Path(__file__).parents[2]
OWNER = "lorry"
OF_OWNER = tuple(
    str(ROOT / place) for place in ("migrations", "catalog/maintenance/backup", "api/commands/bootstrap.py")
)
OWNER_VERBS = ("migrate", "announce")
"""Functions that `bootstrap` calls and no running process does."""
OF_WORKER = str(ROOT / "worker")
OF_API, OF_CATALOG = str(ROOT / "api"), str(ROOT / "catalog")
UNATTRIBUTED = str(ROOT / "catalog/db/database.py")


def assume(engine: Engine) -> None:
    """Let each connection of an engine of the owner have the role of the code that checks it out."""
    if engine.dialect.name == "postgresql" and engine.url.username == OWNER:
        event.listen(engine, "checkout", _set_role)


def _set_role(connection: Any, record: Any, _proxy: Any) -> None:
    role = _role()
    if record.info.get("role", OWNER) != role:
        connection.autocommit = True
        connection.execute(f"set role {role}")
        connection.autocommit = False
        record.info["role"] = role


def _role() -> str:
    """Return the role of the caller. Code of a worker or an API server decides, otherwise the outermost function."""
    frame, found = sys._getframe(2), OWNER
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OF_OWNER) or code.co_name in OWNER_VERBS:
            return OWNER
        if code.co_filename.startswith(OF_API):
            return API_ROLE
        if code.co_filename.startswith(OF_WORKER) or code in _verbs_of("worker", other="api"):
            found = WORKER_ROLE
        elif code in _verbs_of("api", other="worker") or (found == OWNER and _is_attributed(code)):
            found = API_ROLE
        frame = frame.f_back
    return found


def _is_attributed(code: CodeType) -> bool:
    return code.co_filename.startswith(OF_CATALOG) and code.co_filename != UNATTRIBUTED


@cache
def _verbs_of(package: str, *, other: str) -> frozenset[CodeType]:
    """Return the functions of the catalog that one package calls and the other does not."""
    return _called_by(package) - _called_by(other)


def _called_by(package: str) -> frozenset[CodeType]:
    codes: set[CodeType] = set()
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        names: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "catalog":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    found = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                    names[alias.asname or alias.name] = found
        for node in ast.walk(tree):
            called: Any = None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = getattr(names.get(node.value.id), node.attr, None)
            elif isinstance(node, ast.Name):
                called = names.get(node.id)
            if inspect.isfunction(called):
                codes.add(inspect.unwrap(called).__code__)
    return frozenset(codes)

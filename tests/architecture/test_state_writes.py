"""A job's state is written in only one module, which applies the table of transitions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import TypeGuard

from tests.architecture.source_files import SourceFile, dotted, source_files

WRITER = "catalog/lifecycle/transitions.py"
USER_COMMANDS = {"catalog/jobs/submission.py", "catalog/jobs/commands.py"}
WORKER_OPERATIONS = {
    "catalog/queue/claims.py",
    "catalog/queue/claiming.py",
    "catalog/lifecycle/preparation.py",
    "catalog/lifecycle/outcomes.py",
    "catalog/lifecycle/recovery.py",
}
OTHER_STATES = {"importing", "ready", "failed", "deleted", "pending", "removing"}
RAW_SQL = re.compile(r"\bupdate\s+jobs\b|\binsert\s+into\s+jobs\b", re.IGNORECASE)


def test_job_state_is_written_in_one_module() -> None:
    written = {place for source in _services() if source.name != WRITER for place in _state_writes(source)}

    assert written == set()


def test_only_catalog_operations_change_the_state_of_a_job() -> None:
    moved = {
        source.place(node)
        for source in _services()
        if source.name not in USER_COMMANDS | WORKER_OPERATIONS
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and dotted(node.func) in ("move", "moves.move")
    }

    assert moved == set()


def test_jobs_are_created_in_one_module() -> None:
    makers = {
        source.name
        for source in _services()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and dotted(node.func) in ("Job", "tables.Job")
    }

    assert makers == {"catalog/admission/accept.py"}


def test_deleting_files_and_adapters_updates_the_stored_bytes() -> None:
    stored = [source for source in source_files("catalog") if re.search(r"import .*\b(File|Adapter)\b", source.text)]
    hides = [source for source in stored if re.search(r"\bdeleted_at\s*=(?!=|None)", source.text)]

    assert {source.name for source in hides} >= {
        "catalog/storage/files.py",
        "catalog/registry/adapters.py",
        "catalog/maintenance/garbage_collection.py",
    }
    assert [source.name for source in hides if "ledger.store(" not in source.text] == []


def _services() -> Iterator[SourceFile]:
    return source_files("api", "catalog", "worker")


def _state_writes(source: SourceFile) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and _assigns_state(node):
            yield source.place(node)
        if isinstance(node, ast.Call) and (_sets_state(node) or _updates_jobs_state(node)):
            yield source.place(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and RAW_SQL.search(node.value):
            yield source.place(node)


def _assigns_state(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    stored = {part.attr for target in targets for part in ast.walk(target) if _is_stored_attribute(part)}
    if "state" not in stored:
        return False
    # Base models, serving endpoints and deployments have states of their own, with different names.
    values = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return not values & OTHER_STATES


def _is_stored_attribute(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node.value) != "self"


def _sets_state(call: ast.Call) -> bool:
    return dotted(call.func) == "setattr" and isinstance(call.args[1], ast.Constant) and call.args[1].value == "state"


def _updates_jobs_state(call: ast.Call) -> bool:
    """Return whether a call is `update(Job)…values(state=…)`, with its parts chained in any order."""
    names_state = any(keyword.arg == "state" for keyword in call.keywords)
    of_jobs = any(
        isinstance(part, ast.Call)
        and dotted(part.func).endswith("update")
        and part.args
        and dotted(part.args[0]) == "Job"
        for part in ast.walk(call.func)
    )
    return names_state and of_jobs

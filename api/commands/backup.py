"""`python -m api backup`, `restore`, `verify` and `verify-export`, with text or JSON output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from api.commands.bootstrap import open_existing
from catalog import pepper
from catalog.audit import chain
from catalog.errors import InvalidRequest
from catalog.maintenance.audit_anchors import SUPERSEDED_PREFIX
from catalog.maintenance.backup.commands import BackupCheck, create, restore
from catalog.maintenance.backup.commands import verify as check
from catalog.maintenance.backup.location import open_place
from catalog.settings import Settings
from catalog.storage.store import open_store
from catalog.tables.table import Json

WHERE = "Folder, or a URL such as s3://bucket/prefix."
NO_PEPPER = "Verifying the audit chain requires the service's pepper, which this machine does not have."
SHOWN = 20
"""Maximum number of problems printed in full; of the others, only the number is printed."""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    backup = add("backup", help="Back up the database and all files it references. The service keeps running.")
    backup.add_argument("place", help=f"{WHERE} Later backups to the same place add only new objects.")
    backup.add_argument("--keep", type=_at_least_one, metavar="N", help="Keep the newest N backups, delete the others.")
    backup.set_defaults(run=_backup)
    back = add(
        "restore",
        help="Restore a backup into an empty database, SQLite or PostgreSQL, and a store. Verifies the result.",
    )
    back.add_argument("place", help=WHERE)
    back.add_argument("--backup", metavar="NAME", help="Name of the backup (default: the newest).")
    back.set_defaults(run=_restore)
    verify = add("verify", help="Check the database and its files, and verify the audit chain.")
    verify.set_defaults(run=_verify)
    export = add("verify-export", help="Verify an exported audit log.")
    export.add_argument("file", type=Path, help="File written by `lorry audit export`.")
    export.set_defaults(run=_verify_export)
    for command in (backup, back, verify, export):
        command.add_argument("--json", action="store_true")


def _backup(arguments: argparse.Namespace, settings: Settings) -> int:
    db = open_existing(settings, if_older="database_too_old_to_back_up")
    try:
        place, peppers = open_place(arguments.place, is_new=True), pepper.known(settings)
        work_dir = settings.work_dir()
        made = create(db, open_store(settings), place, work_dir=work_dir, peppers=peppers, keep=arguments.keep)
    finally:
        db.close()
    record = made.record
    summary = f"Backup {record.name}: database of {record.dump_bytes} bytes, {record.num_objects} objects"
    _report(
        arguments,
        f"{summary}, {made.num_copied} of them new at this place. {PEPPER}",
        problems=record.problems,
        details={**asdict(record), "num_copied": made.num_copied, "forgotten": made.forgotten},
    )
    return 1 if record.problems else 0


PEPPER = "The backup does not contain the pepper. Store it separately: without it, no restored API key is valid."


def _restore(arguments: argparse.Namespace, settings: Settings) -> int:
    restored = restore(settings, open_place(arguments.place), name=arguments.backup)
    summary = f"Restored backup {restored.record.name}: {_found(restored.checked)}"
    if settings.pepper is None and not (settings.data_dir / "pepper").exists():
        path = settings.data_dir / "pepper"
        summary += (
            f" The audit chain was not verified, because that requires the service's pepper. Set LORRY_PEPPER, or "
            f"write the pepper to {path}, and run `python -m api verify`. Without the pepper no API key is valid."
        )
    if anchors := restored.superseded_anchors:
        summary += (
            f" {len(anchors)} anchors of the audit log were made after the backup and no longer apply: they are in "
        )
        summary += f"{SUPERSEDED_PREFIX}/ of the store, and service.restored in the audit log names them."
    if restored.local_sources:
        paths = ", ".join(f"{name} ({path})" for name, path in sorted(restored.local_sources.items()))
        summary += (
            f" These base models were imported from local paths: {paths}. Each worker needs the path, or a copy of "
            "the folder 'bases' of the old worker's data folder in its own."
        )
    details = {
        "backup": restored.record.name,
        "num_copied": restored.num_copied,
        "superseded_anchors": restored.superseded_anchors,
        "local_sources": restored.local_sources,
        **_counts(restored.checked),
    }
    _report(arguments, summary, problems=restored.checked.problems, details=details)
    return 1 if restored.checked.problems else 0


def _verify(arguments: argparse.Namespace, settings: Settings) -> int:
    db = open_existing(settings, if_older="database_too_old_to_verify")
    try:
        peppers = pepper.known(settings)
        checked = check(db, open_store(settings), peppers=peppers)
    finally:
        db.close()
    summary = f"Checked: {_found(checked)}"
    if not peppers:
        summary += f" {NO_PEPPER} Only the order of its events was checked."
    details = {**_counts(checked), "audit_chain_verified": bool(peppers)}
    _report(arguments, summary, problems=checked.problems, details=details)
    return 1 if checked.problems else 0


def _verify_export(arguments: argparse.Namespace, settings: Settings) -> int:
    found = chain.check_export(_events(arguments.file), peppers=_peppers(settings))
    if found.misfit is not None:
        where = f"{found.misfit.link} ({found.misfit.id})" if found.misfit.id else str(found.misfit.link)
        problems = [f"The audit chain is broken at {where}: {found.misfit.fault}."]
    else:
        problems = []
    summary = f"Checked: {found.num_events} audit events, {len(problems) or 'no'} problems."
    _report(
        arguments, summary, problems=problems, details={"num_events": found.num_events, "last_link": found.last_link}
    )
    return 1 if problems else 0


def _peppers(settings: Settings) -> list[bytes]:
    """Return the known peppers. Raises InvalidRequest if there is none."""
    if peppers := pepper.known(settings):
        return peppers
    path = settings.data_dir / pepper.FILE_NAME
    raise InvalidRequest("audit_pepper_missing", path=str(path))


def _events(path: Path) -> Iterator[Json]:
    """Yield the events of an export, one per line. Raises InvalidRequest."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _event(line, number, path)
    except OSError as error:
        raise InvalidRequest(
            "audit_export_unreadable", path=str(path), strerror=str(error.strerror or error)
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("audit_export_not_text", path=str(path)) from error


def _event(line: str, number: int, path: Path) -> Json:
    try:
        event: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            "audit_export_line_not_json", number=number, path=str(path), colno=error.colno, msg=error.msg
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            "audit_export_line_too_deep" if isinstance(error, RecursionError) else "audit_export_number_too_long",
            number=number,
            path=str(path),
        ) from error
    if not isinstance(event, dict):
        raise InvalidRequest("audit_export_line_not_object", number=number, path=str(path))
    return cast(Json, event)


def _found(checked: BackupCheck) -> str:
    parts = f"{checked.num_artifacts} artifacts, {checked.num_objects} objects, {checked.num_audit_events} audit events"
    return f"{parts}, {len(checked.problems) or 'no'} problems."


def _counts(checked: BackupCheck) -> dict[str, Any]:
    return {name: value for name, value in asdict(checked).items() if name != "problems"}


def _report(arguments: argparse.Namespace, sentence: str, *, problems: list[str], details: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps({**details, "problems": problems}), flush=True)  # noqa: T201
        return
    for problem in problems[:SHOWN]:
        print(problem, flush=True)  # noqa: T201
    if len(problems) > SHOWN:
        print(f"… and {len(problems) - SHOWN} more; --json lists all.", flush=True)  # noqa: T201
    print(sentence, flush=True)  # noqa: T201


def _at_least_one(text: str) -> int:
    """Raises ArgumentTypeError, because argparse shows its message to the user."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid number of backups: must be at least 1.")
    return int(text)

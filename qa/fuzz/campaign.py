"""Runs schemathesis against one service, with the keys of two projects and an operator key, and collects the
outcome."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
from pydantic import SecretStr

from api.app import open_services
from api.settings import ApiSettings
from catalog.db.database import Database
from catalog.settings import Settings
from catalog.tenancy import authentication
from qa.fuzz.answering import answering
from qa.fuzz.sample_objects import (
    ID,
    Key,
    data_file,
    first_adapter,
    ids_of,
    models_by_permission,
    names_by_parameter,
    organization_of,
    parts_by_upload,
    plant,
    reader_of,
)
from tests.api.hook_receiver import receiving
from tests.api.trained import BASE
from tests.catalog.world import PEPPER
from tests.system.api_process import ROOT, api_server

NUM_SIGN_INS = 20
"""Number of sign-in links, each of which can be opened once."""
EXAMPLE_BASE, EXAMPLE_HOOK = "smollm2-135m", "https://example.com/hooks"
EXAMPLE_FILES = ("file-3f2b8c9d0a1e4f5a6b7c8d9e", "file-4a3b8c9d0a1e4f5a6b7c8d9e")
"""Names in the bodies of the document's examples."""
CHANCE = 0.7
"""Probability with which a parameter gets the name of an existing object of one of the projects."""
BODY_FIELDS = {
    "model": "start",
    "plan": "plan_id",
    "project": "project",
    "project_ids[*]": "reader",
    "organization": "organization",
    "url": "hook",
    "training_file": "file_id",
    "validation_file": "file_id",
    "parent_adapter": "adapter",
    "part_ids[*]": "part_ids",
}
"""Body fields, with the pool of their values."""
STATEFUL = "stateful"
SCENARIOS, STEPS = 8, 12
"""Limits for a round of the stateful phase: chains of requests for each example, and requests in a chain."""
PARTS = (
    r"^/v1/(files|uploads|models)",
    r"^/v1/(files|fine_tuning/jobs|plans)",
    r"^/v1/(files|sweeps)",
    r"^/v1/(adapters|models|fine_tuning)",
    r"^/v1/webhook",
    r"^/v1/(organizations|projects|api_keys|audit_events|usage)",
    r"^/",
)
"""Parts of the API, by paths. A round ends silently at the first scenario that continues differently from one with the
same beginning, because the service has state. Therefore a round over all paths would never test most of them."""
OPERATORS_PARTS = PARTS[3], PARTS[5], PARTS[6]
OPERATORS_PATHS = (
    r"^/v1/(models|organizations|projects|api_keys|queue|workers|usage|audit|fine_tuning/checkpoints)"
    r"|^/metrics|^/v1/sign_in_links"
)
"""Paths where an operator key may do more than other keys."""

ENVIRONMENT = {
    "LORRY_STREAM_POLL_SECONDS": "0.05",
    "LORRY_SHUTDOWN_SECONDS": "2",
    "LORRY_REQUESTS_PER_MINUTE": "0",  # the fuzzer sends as fast as it can, also without a key
    "LORRY_PUBLIC_URL": "http://127.0.0.1",  # else /metrics is open to this machine
    "LORRY_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.1/32",
    "LORRY_WEBHOOK_ALLOW_HTTP": "true",
}
CRASH = re.compile(r" crash (request_id=|in a stream)")
"""The service's log lines about exceptions that nothing has handled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """The parameters of a run. examples: limit per operation and phase. rounds: of the stateful phase over each part of
    the API. only: a regular expression for paths."""

    seed: int = 1
    examples: int = 5
    rounds: int = 1
    phases: str = "examples,coverage,fuzzing,stateful"
    only: str = ""
    is_short: bool = False
    """Only one project sends requests, and a round covers the whole API."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """The number of responses for each operation and status."""

    counts: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    is_well: bool = True

    def table(self) -> str:
        statuses = sorted({status for _, status in self.counts})
        labels = sorted({label for label, _ in self.counts})
        lines = [f"{'operation':58}" + "".join(f"{status:>7}" for status in statuses)]
        for label in labels:
            row = [self.counts[label, status] for status in statuses]
            lines.append(f"{label:58}" + "".join(f"{number or '':>7}" for number in row))
        return "\n".join([*lines, f"{self.counts.total()} requests for {len(labels)} operations"])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Site:
    """The tested service and its files. hooks: a URL that receives webhooks."""

    folder: Path
    url: str
    db: Database
    hooks: str


def run(campaign: Campaign, folder: Path, *, database_url: str, echo: TextIO) -> Outcome:
    """Fill a database, serve it, and send requests as each project, then as an operator of the first project."""
    data_dir = folder / "data"
    data_dir.mkdir()
    settings = Settings(
        data_dir=data_dir, database_url=SecretStr(database_url), pepper=SecretStr(PEPPER.current.decode())
    )
    services = open_services(settings, ApiSettings())
    services.db.migrate()
    outcome, log = Outcome(), folder / "service.log"
    with receiving() as receiver:
        planted = plant(services, folder, hooks=receiver.url)
        first, second = planted.keys
        pairs = ((first, second), (second, first), (planted.operator, second))
        environment = {
            "LORRY_DATA_DIR": str(data_dir),
            "LORRY_DATABASE_URL": database_url,
            "LORRY_PEPPER": PEPPER.current.decode(),
            **ENVIRONMENT,
        }
        with answering(services.db, settings), api_server(log=log, **environment) as url:
            # generated at the first request, which on a busy machine takes longer than schemathesis waits
            httpx.get(f"{url}/openapi.json", timeout=120, trust_env=False).raise_for_status()
            for me, other in pairs[:1] if campaign.is_short else pairs:
                site = _Site(folder=folder, url=url, db=services.db, hooks=receiver.url)
                _ask(campaign, site, me, other, echo=echo, outcome=outcome)
    services.db.close()
    if CRASH.search(log.read_text()):
        outcome.is_well = False
        echo.write(log.read_text()[-20_000:])
    return outcome


def _ask(campaign: Campaign, site: _Site, me: Key, other: Key, *, echo: TextIO, outcome: Outcome) -> None:
    folder, mine, theirs = site.folder, *(names_by_parameter(site.db, one.project_id) for one in (me, other))
    _write(folder / "brief.json", _brief(site, me, other, mine, theirs))
    _write(folder / "users.json", {"auth": [_person(me), _person(other)]})
    config = _config(campaign, folder, me, other, _pools(site, me, other, mine, theirs))
    only = campaign.only or (OPERATORS_PATHS if me.is_operator else "^/")
    phases = [phase for phase in campaign.phases.split(",") if phase != STATEFUL]
    turns = [(",".join(phases), [only])] if phases else []
    if STATEFUL in campaign.phases:
        parts = PARTS[-1:] if campaign.is_short or campaign.only else OPERATORS_PARTS if me.is_operator else PARTS
        turns += [(STATEFUL, [only, part]) for part in parts * campaign.rounds]
    for number, (turn, paths) in enumerate(turns):
        (folder / "schemathesis.toml").write_text(f"seed = {campaign.seed + number}\n{config}")
        told, is_well = _run(site, turn, paths, outcome)
        echo.write(f"\n== as {me.mark}{', an operator' if me.is_operator else ''}: {turn} {paths[-1]}\n{told}\n")
        echo.flush()
        outcome.is_well = outcome.is_well and is_well


def _run(site: _Site, phases: str, paths: list[str], outcome: Outcome) -> tuple[str, bool]:
    """Run schemathesis. Returns its output, and whether it found nothing. paths: regular expressions that must all
    match."""
    folder = site.folder
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml")]
    command += ["run", f"{site.url}/openapi.json", "--phases", phases]
    command += ["--include-path-regex", "".join(f"(?={path})" for path in paths)]
    environment = {**os.environ, "FUZZ_BRIEF": str(folder / "brief.json"), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    counts = folder / "counts.json"
    assert counts.exists(), done.stdout + done.stderr
    for label, status, number in json.loads(counts.read_text()):
        outcome.counts[label, status] += number
    counts.unlink()
    return f"{done.stdout}\n{done.stderr}", done.returncode == 0


def _brief(
    site: _Site, me: Key, other: Key, mine: dict[str, list[str]], theirs: dict[str, list[str]]
) -> dict[str, Any]:
    names = {name for names in theirs.values() for name in names if other.mark in name}
    data = data_file(site.db, me.project_id)
    their_ids = ids_of(site.db, other.project_id)
    assert their_ids.isdisjoint(ids_of(site.db, me.project_id)), "an object belongs to both projects"
    return {
        "is_operator": me.is_operator,
        "my_key": me.id,
        "my_secret": me.secret,
        "another_key": next(one for one in mine["api_key_id"] if one != me.id),
        "my_project": [me.project_id, me.mark],
        "parts": parts_by_upload(site.db, me.project_id),
        "shared": models_by_permission(site.db, me.project_id),
        "kept": first_adapter(site.db, me.project_id),
        "examples": {**dict.fromkeys(EXAMPLE_FILES, data), EXAMPLE_BASE: BASE, EXAMPLE_HOOK: site.hooks},
        "id_form": ID.pattern,
        "their_ids": sorted(their_ids),
        "their_words": [*sorted(names, key=len, reverse=True), other.mark],
        "their_mark": other.mark,
        "counts": str(site.folder / "counts.json"),
    }


def _pools(
    site: _Site, me: Key, other: Key, mine: dict[str, list[str]], theirs: dict[str, list[str]]
) -> dict[str, list[Any]]:
    """Return the values for parameters and fields: all of this project, and some of the other project."""
    pools: dict[str, list[Any]] = {name: names + theirs[name][: len(names) // 3 + 1] for name, names in mine.items()}
    pools["project"] = [me.project_id, me.mark, other.project_id, other.mark]
    tokens = [authentication.create_sign_in_link(site.db, api_key_id=me.id, pepper=PEPPER) for _ in range(NUM_SIGN_INS)]
    pools |= {
        "base": [BASE, "smol"],
        "start": [BASE, BASE, "smol", *pools["model"]],
        "path": ["README.md", "adapter_config.json"],
        "number": [0, 1],
        "reader": [reader_of(me.mark), reader_of(other.mark)],
        "organization": [organization_of(me.mark), organization_of(other.mark)],
        "tag": [me.mark, other.mark],
        "hook": [f"{site.hooks}/{me.mark}"],
        "token": tokens,
    }
    return {name: values for name, values in pools.items() if values}


def _person(key: Key) -> dict[str, Any]:
    return {"name": key.name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key.secret}"}]}


def _config(campaign: Campaign, folder: Path, me: Key, other: Key, pools: dict[str, list[Any]]) -> str:
    """Return the configuration of schemathesis. An operator has no peers, because it sees the names of other keys."""
    lines = [
        'hooks = "qa.fuzz.hooks"',
        "continue-on-failure = true",
        "max-stream-events = 2",
        "request-timeout = 20",
        "[cache]",
        "enabled = false",
        "[generation]",
        f"max-examples = {campaign.examples}",
        'database = "none"',
        "[phases.stateful]",
        f"max-steps = {STEPS}",
        f"generation = {{ max-examples = {SCENARIOS * campaign.examples} }}",
        "[checks.negative_data_rejection]",
        # the default ones, and 413: too long content is refused before any other check
        'expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429"]',
        "[auth.wfc]",
        f"path = {json.dumps(str(folder / 'users.json'))}",
        f"user = {json.dumps(me.name)}",
        *([] if me.is_operator else [f"peers = {json.dumps([me.name, other.name])}"]),
    ]
    for name, values in pools.items():
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(values)}"]
    named = {f"path.{name}": name for name in pools} | {f"body.{name}": pool for name, pool in BODY_FIELDS.items()}
    named |= {"query.model": "base", "query.tag[*]": "tag", "body.token": "token", "query.project": "project"}
    for place, pool in ((place, pool) for place, pool in named.items() if pool in pools):
        lines += [f"[parameters.{json.dumps(place)}]", f'dictionary = "{pool}"', f"probability = {CHANCE}"]
    return "\n".join(lines) + "\n"


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))

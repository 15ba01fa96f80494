"""Runs of schemathesis against one service, with the keys of two projects and an operator's; and what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pydantic import SecretStr

from api.app import open_services
from api.settings import ApiSettings
from catalog.db import Database
from catalog.settings import Settings
from tests.api.trained import BASE
from tests.catalog.world import PEPPER
from tests.fuzz.planted import Key, names_by_parameter, parts_by_upload, plant
from tests.fuzz.service import ROOT, serving

CHANCE = 0.7
"""How often a parameter that names something gets a name that one of the projects has."""
BODY_FIELDS = {
    "model": "base",
    "training_file": "file_id",
    "validation_file": "file_id",
    "parent_adapter": "adapter",
    "part_ids[*]": "part_ids",
}
"""Fields of bodies, by whose names they take."""
OPERATORS_PATHS = r"^/v1/(models|projects|api_keys|queue|workers|usage|audit)|^/metrics|^/sign-in"
"""Where an operator's key may do more than another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """What is run. examples: of each operation in each phase, at most. only: a regular expression of paths."""

    seed: int = 1
    examples: int = 100
    phases: str = "examples,coverage,fuzzing,stateful"
    only: str = ""
    is_short: bool = False
    """One project asks, the other is only looked for."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How often each operation was answered with each status."""

    counts: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    is_well: bool = True

    def num_cases(self) -> int:
        return self.counts.total()

    def table(self) -> str:
        statuses = sorted({status for _, status in self.counts})
        labels = sorted({label for label, _ in self.counts})
        lines = [f"{'operation':58}" + "".join(f"{status:>7}" for status in statuses) + f"{'all':>8}"]
        for label in labels:
            row = [self.counts[label, status] for status in statuses]
            lines.append(f"{label:58}" + "".join(f"{number or '':>7}" for number in row) + f"{sum(row):>8}")
        sums = [sum(self.counts[label, status] for label in labels) for status in statuses]
        lines.append(f"{len(labels):<58}" + "".join(f"{number:>7}" for number in sums) + f"{self.num_cases():>8}")
        return "\n".join(lines)


def run(campaign: Campaign, folder: Path, *, database_url: str, echo: TextIO) -> Outcome:
    """Fill a database, serve it, and ask as each project, then as an operator of the first."""
    data_dir = folder / "data"
    data_dir.mkdir()
    settings = Settings(data_dir=data_dir, database_url=database_url, pepper=SecretStr(PEPPER.decode()))
    services = open_services(settings, ApiSettings())
    services.db.migrate()
    planted = plant(services, folder)
    first, second = planted.keys
    outcome, log = Outcome(), folder / "service.log"
    with serving(settings, log) as url:
        pairs = ((first, second), (second, first), (planted.operator, second))
        for me, other in pairs[:1] if campaign.is_short else pairs:
            _ask(campaign, folder, url, services.db, me, other, echo=echo, outcome=outcome)
    services.db.close()
    if "crash" in log.read_text():
        outcome.is_well = False
        echo.write(log.read_text()[-20_000:])
    return outcome


def _ask(
    campaign: Campaign, folder: Path, url: str, db: Database, me: Key, other: Key, *, echo: TextIO, outcome: Outcome
) -> None:
    mine, theirs = (names_by_parameter(db, one.project_id) for one in (me, other))
    _write(folder / "brief.json", _brief(folder, db, me, other, mine, theirs))
    _write(folder / "people.json", {"auth": [_person(me), _person(other)]})
    pools = {name: names + theirs[name][: len(names) // 3 + 1] for name, names in mine.items()}
    pools |= {"base": [BASE, "smol"], "path": ["README.md", "adapter_config.json"]}
    pools["project"] = [me.project_id, me.mark, other.project_id, other.mark]
    config = folder / "schemathesis.toml"
    config.write_text(_config(campaign, folder, me, other, pools))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json"]
    command += ["--phases", campaign.phases]
    only = campaign.only or (OPERATORS_PATHS if me.is_operator else "")
    command += ["--include-path-regex", only] if only else []
    environment = {**os.environ, "FUZZ_BRIEF": str(folder / "brief.json"), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    echo.write(f"\n== as {me.mark}{', an operator' if me.is_operator else ''}\n{done.stdout}\n{done.stderr}\n")
    echo.flush()
    outcome.is_well = outcome.is_well and done.returncode == 0
    for label, status, number in json.loads((folder / "counts.json").read_text()):
        outcome.counts[label, status] += number


def _brief(
    folder: Path, db: Database, me: Key, other: Key, mine: dict[str, list[str]], theirs: dict[str, list[str]]
) -> dict[str, Any]:
    known = [other.project_id, *(name for names in theirs.values() for name in names)]
    return {
        "is_operator": me.is_operator,
        "my_key": me.id,
        "another_key": next(one for one in mine["api_key_id"] if one != me.id),
        "my_project": [me.project_id, me.mark],
        "parts": parts_by_upload(db, me.project_id),
        "their_names": known,
        "their_mark": other.mark,
        "counts": str(folder / "counts.json"),
    }


def _person(key: Key) -> dict[str, Any]:
    return {"name": key.name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key.secret}"}]}


def _config(campaign: Campaign, folder: Path, me: Key, other: Key, pools: dict[str, list[str]]) -> str:
    """An operator is no peer: what others' keys are called is shown to it."""
    lines = [
        f"seed = {campaign.seed}",
        'hooks = "tests.fuzz.hooks"',
        "continue-on-failure = true",
        "max-stream-events = 2",
        "request-timeout = 20",
        "[cache]",
        "enabled = false",
        "[generation]",
        f"max-examples = {campaign.examples}",
        'database = "none"',
        "[checks.negative_data_rejection]",
        # the usual ones, and 413: what is too long is refused before anybody looks what else is wrong with it
        'expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429"]',
        "[auth.wfc]",
        f"path = {json.dumps(str(folder / 'people.json'))}",
        f"user = {json.dumps(me.name)}",
        *([] if me.is_operator else [f"peers = {json.dumps([me.name, other.name])}"]),
    ]
    for name, values in pools.items():
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(values)}"]
    named = {f"path.{name}": name for name in pools} | {f"body.{name}": pool for name, pool in BODY_FIELDS.items()}
    named["query.model"] = "base"
    for place, pool in named.items():
        lines += [f"[parameters.{json.dumps(place)}]", f'dictionary = "{pool}"', f"probability = {CHANCE}"]
    return "\n".join(lines) + "\n"


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))

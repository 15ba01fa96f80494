"""The lock files: complete, pinned by version and sha256, and used by every installation that the project describes."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
LOCKED = {"api": "[telemetry]", "worker": "[worker,quant,telemetry]", "demo": "[demo]", "dev": "[dev]"}
"""The extras of lorry-server that each lock file installs."""
ENTRY = re.compile(
    r"^(?P<requirement>[A-Za-z0-9].*?) \\\n(?P<hashes>(?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)
INSTALLERS = [".ci/set-up", "Dockerfile", "docs/how-to/deploy.md"]


def entries(name: str) -> list[Requirement]:
    text = (ROOT / "requirements" / f"{name}.lock").read_text("utf-8")
    return [Requirement(found["requirement"]) for found in ENTRY.finditer(text)]


def pins(name: str) -> dict[str, set[str]]:
    """Return the pinned versions by canonical name. A package may have several, one for each Python version."""
    found: dict[str, set[str]] = {}
    for entry in entries(name):
        found.setdefault(canonicalize_name(entry.name), set()).update(each.version for each in entry.specifier)
    return found


def requirements(project: Requirement) -> list[Requirement]:
    """Return the requirements of a distribution with its extras, without the server's pin of the client."""
    folder = {"lorry": "client", "lorry-server": "."}[project.name]
    table = tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))
    always = table["project"].get("dependencies") or table["dependency-groups"]["server"]
    extras = [table["project"]["optional-dependencies"][extra] for extra in project.extras]
    return [Requirement(text) for text in itertools.chain(always, *extras)]


def test_there_is_one_lock_file_for_each_use_and_each_torch_variant() -> None:
    assert {path.stem for path in LOCKS} == {*LOCKED, "torch", "torch-cpu"}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_locked_package_has_an_exact_version_and_a_hash(path: Path) -> None:
    lines = [line for line in path.read_text("utf-8").splitlines() if re.match(r"[A-Za-z0-9]", line)]

    assert lines
    assert len(entries(path.stem)) == len(lines)
    for entry in entries(path.stem):
        assert entry.url or [each.operator for each in entry.specifier] == ["=="], str(entry)


@pytest.mark.parametrize("name", LOCKED)
def test_lock_file_satisfies_the_ranges_of_its_extras(name: str) -> None:
    ours, others = [Requirement("lorry"), Requirement(f"lorry-server{LOCKED[name]}")], list[Requirement]()
    for project in ours:
        for requirement in requirements(project):
            known = ours if requirement.name in ("lorry", "lorry-server") else others
            if requirement not in known:
                known.append(requirement)
    locked = pins(name)

    assert len(others) > len(requirements(Requirement("lorry-server")))
    for requirement in others:
        versions = (pins("torch") if requirement.name == "torch" else locked)[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in versions), requirement.name


@pytest.mark.parametrize("name", LOCKED)
def test_lock_file_has_the_build_requirements_of_lorry(name: str) -> None:
    tables = [
        tomllib.loads(path.read_text("utf-8")) for path in (ROOT / "pyproject.toml", ROOT / "client/pyproject.toml")
    ]
    build = {text for table in tables for text in table["build-system"]["requires"]}

    assert build
    for requirement in map(Requirement, build):
        versions = pins(name).get(canonicalize_name(requirement.name), set())
        assert versions, requirement.name
        assert all(requirement.specifier.contains(version) for version in versions)


def test_lock_files_agree_on_every_version() -> None:
    whole = pins("dev")

    for name in ("api", "worker", "demo"):
        assert {package: versions for package, versions in pins(name).items() if not versions <= whole[package]} == {}


def test_both_torch_variants_have_the_same_version() -> None:
    (version,) = pins("torch")["torch"]

    assert {re.search(r"/torch-([\d.]+)%2Bcpu-", str(entry.url))[1] for entry in entries("torch-cpu")} == {version}  # type: ignore[index]
    assert f"TORCH={version}\n" in (ROOT / ".ci/lock").read_text("utf-8")


@pytest.mark.parametrize("name", INSTALLERS)
def test_installations_neither_resolve_packages_nor_mix_indexes(name: str) -> None:
    text = (ROOT / name).read_text("utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install.*", text)

    assert installs
    assert "--extra-index-url" not in text
    of_torch = '"$range"'  # installed from an index of torch builds, with the CUDA libraries of its build
    assert [line for line in installs if "--no-deps" not in line and of_torch not in line] == []
    assert "--require-hashes" in text

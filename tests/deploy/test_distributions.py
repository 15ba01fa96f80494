"""The two distributions: `lorry` installs only the client, and `lorry-server` the service and the required client.

The slow tests build both and install them in empty environments, without the checkout. The client's environment gets
the releases that dev.lock pins. The server's environments get the newest releases that the wheels allow.
"""

from __future__ import annotations

import ast
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lorry import __version__
from tests import tiny_base
from tests.architecture.source_files import ROOT, source_files

SERVER_PACKAGES = {"api", "catalog", "dashboard", "lora_core", "migrations", "worker"}
OURS = {"lorry", *SERVER_PACKAGES}
PROJECTS = {"lorry": "client", "lorry-server": "."}
"""The directory of each distribution's pyproject.toml."""
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "benchmarks", "docs")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
WITH_WORKER = "lorry-server[worker]"
IMPORT_ALL = """
import importlib, pkgutil, lorry
for module in pkgutil.walk_packages(lorry.__path__, "lorry."):
    importlib.import_module(module.name)
"""
TIMEOUT_SECONDS = 600


def test_client_requires_exactly_what_its_modules_import() -> None:
    project = tomllib.loads((ROOT / "client/pyproject.toml").read_text("utf-8"))["project"]
    declared = {Requirement(text).name for text in project["dependencies"]}

    imported = {name for source in source_files("lorry") for name in _imported(source.tree)}
    third_party = imported - sys.stdlib_module_names - {"lorry"}

    assert {packages_distributions()[name][0] for name in third_party} == declared


def test_version_is_stated_once() -> None:
    stated = re.compile(rf"(?<![\w.]){re.escape(__version__)}(?![\w.])")
    texts = {name: (ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "client/pyproject.toml", "setup.py")}
    texts |= {source.name: source.text for source in source_files()}

    places = {name: len(stated.findall(text)) for name, text in texts.items() if stated.search(text)}

    assert places == {"lorry/__init__.py": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """A virtual environment, and an empty directory in which its commands run."""

    root: Path
    work: Path

    def python(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-P", *arguments, **environ)

    def run(self, command: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        argv, env = [str(self.root / "bin" / command), *arguments], self.environ() | environ
        return subprocess.run(
            argv, cwd=self.work, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )

    def environ(self) -> dict[str, str]:
        """Return the variables of commands, without settings of the test run and the address of a service."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORRY_", "PYTHON"))}
        return {**kept, "HOME": str(self.work), "OMP_NUM_THREADS": "1"}

    def importable(self) -> dict[str, str]:
        """Return the directory of each of our packages that can be imported."""
        code = (
            "from importlib.util import find_spec\n"
            f"for name in {sorted(OURS)}:\n"
            "    if spec := find_spec(name): print(name, *spec.submodule_search_locations)"
        )
        return dict(line.split(" ", 1) for line in _succeeded(self.python("-c", code)).splitlines())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout, because a build writes into it and reads the files of an earlier build."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "lorry", symlinks=True, ignore=NOT_COPIED)


@pytest.fixture(scope="module")
def wheels(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the wheel of each distribution, built from its source distribution as `make dist` does."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in PROJECTS.values():
        _build(tree / project, folder)
    return {name: folder / f"{name.replace('-', '_')}-{__version__}-py3-none-any.whl" for name in PROJECTS}


@pytest.fixture(scope="module")
def client(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = _environment(tmp_path_factory.mktemp("client"))
    lock = (ROOT / "requirements/dev.lock").read_text("utf-8")
    pins = environment.root / "pins.txt"
    pins.write_text("\n".join(re.findall(r"^([A-Za-z0-9._-]+==.+?) \\$", lock, re.MULTILINE)))
    _install(environment, "--constraint", str(pins), str(wheels["lorry"]))
    return environment


@pytest.fixture(scope="module")
def index(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with our wheels and all that they and uvx require: a package index for installers."""
    folder = tmp_path_factory.mktemp("index")
    arguments = ["--dest", str(folder), "--find-links", str(wheels["lorry"].parent)]
    _succeeded(_run([*PIP, "download", *arguments, f"{WITH_WORKER}=={__version__}", "uv"], cwd=folder))
    return folder


@pytest.mark.slow
def test_wheels_contain_exactly_the_files_of_their_packages(wheels: dict[str, Path]) -> None:
    for name, packages in (("lorry", {"lorry"}), ("lorry-server", SERVER_PACKAGES)):
        in_checkout = [path for package in packages for path in (ROOT / package).rglob("*") if path.is_file()]
        files = {path.relative_to(ROOT).as_posix() for path in in_checkout if path.parent.name != "__pycache__"}
        assert _files(wheels[name]) == files


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECTS)
def test_wheel_of_the_checkout_equals_wheel_of_the_source_distribution(
    name: str, wheels: dict[str, Path], tree: Path, tmp_path: Path
) -> None:
    _build(tree / PROJECTS[name], tmp_path, "--wheel")

    with zipfile.ZipFile(tmp_path / wheels[name].name) as one, zipfile.ZipFile(wheels[name]) as other:
        assert {each.filename: each.CRC for each in one.infolist() if not each.filename.endswith("RECORD")} == {
            each.filename: each.CRC for each in other.infolist() if not each.filename.endswith("RECORD")
        }


@pytest.mark.slow
def test_server_requires_the_client_of_its_own_version(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["lorry-server"]) as archive:
        metadata = email.message_from_bytes(archive.read(f"lorry_server-{__version__}.dist-info/METADATA"))

    unconditional = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert f"lorry=={__version__}" in unconditional
    assert {"fastapi", "sqlalchemy", "celery"} <= {Requirement(text).name for text in unconditional}


@pytest.mark.slow
def test_client_works_with_only_its_own_dependencies(client: Environment) -> None:
    assert client.importable().keys() == {"lorry"}
    assert client.run("lorry", "--version").stdout.strip() == __version__
    assert "sweep" in _succeeded(client.run("lorry", "--help"))
    _succeeded(client.python("-c", IMPORT_ALL))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["up", "worker"])
def test_commands_that_need_the_server_name_the_missing_packages(command: str, client: Environment) -> None:
    done = client.run("lorry", command)

    assert done.returncode == 1
    assert "lorry-server, torch" in done.stderr
    assert f'-m pip install "{WITH_WORKER}=={__version__}"' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip", "uvx"])
def test_first_adapter_is_trained_by_a_service_from_its_wheels(installer: str, index: Path, tmp_path: Path) -> None:
    environment = _environment(tmp_path)
    local = ["--no-index", "--find-links", str(index)]
    packages = [WITH_WORKER] if installer == "pip" else ["uv"]
    _install(environment, *local, *packages)
    lorry = (
        ["lorry"] if installer == "pip" else ["uvx", *local, "--python", sys.executable, "--with", WITH_WORKER, "lorry"]
    )
    base = tiny_base.make(tmp_path / "base")
    rows = "\n".join(map(json.dumps, tiny_base.chat_rows(20)))
    (environment.work / "chats.jsonl").write_text(rows, "utf-8")

    def run(*arguments: str) -> str:
        return _succeeded(environment.run(*lorry, *arguments))

    up = json.loads(run("up", "--detach", "--devices", "cpu", "--json"))
    try:
        dashboard = environment.run(
            "python", "-c", f"import urllib.request as r; print(r.urlopen('{up['url']}').read().decode())"
        )
        run("models", "add", "tiny", str(base))
        run("jobs", "submit", "tiny", "chats.jsonl", "--epochs", "2", "--suffix", "quickstart", "--watch")
        answer = run("chat", "quickstart", "Where is the red crate?")
        run("adapters", "pull", "quickstart", "quickstart/")
    finally:
        run("down")

    assert dashboard.stdout.strip() == (ROOT / "dashboard/index.html").read_text("utf-8").strip()
    assert answer.strip()
    assert (environment.work / "quickstart/adapter_model.safetensors").is_file()


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield the top-level names of all absolute imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "a relative import"
            yield node.module.partition(".")[0]


def _environment(folder: Path) -> Environment:
    venv.create(folder / "venv", symlinks=True)
    (folder / "work").mkdir()
    return Environment(root=folder / "venv", work=folder / "work")


def _install(environment: Environment, *arguments: str) -> None:
    _succeeded(
        _run([*PIP, "--python", str(environment.root / "bin/python"), "install", *arguments], cwd=environment.work)
    )


def _build(project: Path, folder: Path, *arguments: str) -> None:
    """Build the distributions of a project, with the setuptools of this environment."""
    build = ["-m", "build", "--no-isolation", "--outdir", str(folder), *arguments, str(project)]
    _succeeded(_run([sys.executable, *build], cwd=folder))


def _files(wheel: Path) -> set[str]:
    """Return the files of a wheel, without the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def _run(argv: list[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)


def _succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

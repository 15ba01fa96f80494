"""The two distributions: `lorry` installs only the client, and `lorry-server` the service and the required client.

The slow tests build both and install them in virtual environments of their own. The client's environment gets the
client's dependencies from PyPI, as dev.lock pins them. The server's environment gets no dependencies, because torch is
large: a path file adds the libraries of the environment that runs the tests. The path file does not add our own
packages: they are editable installs, which need path files, and Python ignores path files in an added directory.
"""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from lorry import __version__
from lorry.connection import read
from tests.architecture.source_files import ROOT, source_files
from tests.lorry.local.test_local import until

SERVER_PACKAGES = {"api", "catalog", "dashboard", "lora_core", "migrations", "worker"}
OURS = {"lorry", *SERVER_PACKAGES}
PROJECTS = {"lorry": "client", "lorry-server": "."}
"""The directory of each distribution's pyproject.toml."""
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "benchmarks", "docs")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
BUILD_SDIST = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
IMPORT_ALL = """
import importlib, pkgutil, lorry
for module in pkgutil.walk_packages(lorry.__path__, "lorry."):
    importlib.import_module(module.name)
"""
TIMEOUT_SECONDS = 600


def test_client_requires_exactly_what_its_modules_import() -> None:
    project = tomllib.loads((ROOT / "client/pyproject.toml").read_text("utf-8"))["project"]
    optional = [text for extra in project["optional-dependencies"].values() for text in extra]
    declared = {Requirement(text).name for text in [*project["dependencies"], *optional]}

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
    """Return the wheel of each distribution, built from its source distribution as an installer does."""
    folder = tmp_path_factory.mktemp("wheels")
    for name, project in PROJECTS.items():
        _succeeded(_run([sys.executable, "-c", BUILD_SDIST, str(folder)], cwd=tree / project))
        (sdist,) = folder.glob(f"{name.replace('-', '_')}-{__version__}.tar.gz")
        _build(str(sdist), folder)
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
def server(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = _environment(tmp_path_factory.mktemp("server"))
    _install(environment, "--no-index", "--no-deps", *map(str, wheels.values()))
    (site_packages,) = environment.root.glob("lib/python*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


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
    _build(str(tree / PROJECTS[name]), tmp_path)

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
    assert '-m pip install ./client ".[worker]"' in done.stderr


@pytest.mark.slow
def test_service_runs_from_its_wheels(server: Environment) -> None:
    folders = server.importable()
    assert folders.keys() == OURS
    assert [name for name, folder in folders.items() if not Path(folder).is_relative_to(server.root)] == []
    assert "bootstrap" in _succeeded(server.python("-m", "api", "--help"))

    with _up(server) as data_dir:
        known = read(data_dir)
        assert known is not None
        dashboard = httpx.get(known.url, follow_redirects=True, trust_env=False)
        until(
            lambda: server.python("-m", "worker.entrypoints.healthcheck", LORRY_DATA_DIR=str(data_dir)).returncode == 0
        )

    assert dashboard.text == (ROOT / "dashboard/index.html").read_text("utf-8")


@contextmanager
def _up(environment: Environment) -> Iterator[Path]:
    """Run `lorry up` and yield its data folder. Drains the service at the end of the block."""
    data_dir, log = environment.work / "data", environment.work / "stderr.txt"
    argv = [str(environment.root / "bin/lorry"), "up", "--json", "--devices", "cpu", "--data-dir", str(data_dir)]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            argv, cwd=environment.work, env=environment.environ(), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), log.read_text("utf-8")
            yield data_dir
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()


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


def _build(source: str, folder: Path) -> None:
    """Build the wheel of a source distribution or a directory, with the setuptools of this environment."""
    wheel = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), source]
    _succeeded(_run([*PIP, *wheel], cwd=folder))


def _files(wheel: Path) -> set[str]:
    """Return the files of a wheel, without the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def _run(argv: list[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)


def _succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

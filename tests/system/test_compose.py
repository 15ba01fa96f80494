"""docker-compose.yml as text, and its services as plain processes in the documented order.

No Docker engine takes part: tests/compose builds the images and runs the services on one.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import yaml
from opentelemetry.sdk import environment_variables as of_opentelemetry
from sqlalchemy import make_url

from api.__main__ import _parser as api_parser
from api.settings import ApiSettings
from catalog import logs
from catalog.db.database import Database
from catalog.settings import Settings
from catalog.tables.privileges import API_ROLE, WORKER_ROLE
from tests.services.postgres import as_role
from tests.services.postgres import find as find_postgres
from tests.services.running import free_port, running
from tests.services.s3 import new_bucket

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {name for name, service in SERVICES.items() if service.get("restart") == "no"}
OURS = {name for name, service in SERVICES.items() if str(service.get("image", "")).startswith("lorry-")}
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")
REPLACED = {"LORRY_DEVICE"}
"""Variables of earlier versions. The services get them only to report them."""
FILLED = "filled" * 6
"""Replaces each secret. It is as long as a pepper must be."""
SECRET = re.compile(r"PASSWORD|SECRET|KEY|PEPPER|AUTH")


def depends_on(name: str) -> dict[str, str]:
    return {other: how["condition"] for other, how in SERVICES[name].get("depends_on", {}).items()}


def example() -> dict[str, str]:
    """Return every variable that .env.example sets or mentions."""
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    return dict(line.lstrip("#").split("=", 1) for line in lines if re.match(r"#?\w+=", line))


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    else:
        yield str(value)


def test_services_start_in_the_documented_order() -> None:
    order = list(TopologicalSorter({name: depends_on(name) for name in SERVICES}).static_order())
    place = {name: index for index, name in enumerate(order)}
    header = (ROOT / "docker-compose.yml").read_text("utf-8").split("\nname:")[0]

    assert "postgres, redis, store → bootstrap (creates the bucket, migrates) → api, worker" in header
    for earlier, later in [("store", "bootstrap"), ("postgres", "bootstrap")]:
        assert place[earlier] < place[later]
    for last in ("api", "worker-cpu", "worker-gpu"):
        assert depends_on(last)["bootstrap"] == "service_completed_successfully"
        assert {"postgres", "redis", "store"} <= depends_on(last).keys()


def test_services_wait_until_their_dependencies_are_ready() -> None:
    for name in SERVICES:
        for other, condition in depends_on(name).items():
            wanted = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert condition == wanted, f"{name} waits for {other}"


@pytest.mark.parametrize("name", sorted(set(SERVICES) - ONE_SHOT))
def test_every_long_running_service_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]

    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries"} <= check.keys()


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_no_service_has_access_to_the_host(name: str) -> None:
    service = SERVICES[name]

    assert not {"network_mode", "privileged", "pid", "ipc", "cap_add", "devices"} & service.keys()
    assert "no-new-privileges:true" in service["security_opt"]
    assert not any("docker.sock" in text for text in texts(service))
    assert set(service["networks"]) <= COMPOSE["networks"].keys()


@pytest.mark.parametrize("name", sorted(OURS))
def test_lorrys_services_are_read_only_and_have_no_capabilities(name: str) -> None:
    assert SERVICES[name]["read_only"] is True
    assert SERVICES[name]["cap_drop"] == ["ALL"]


def test_no_service_runs_as_root() -> None:
    for name in set(SERVICES) - OURS:  # the Dockerfile sets the user of Lorry's own services, see below
        assert SERVICES[name]["user"] in ("postgres", "redis")


def test_only_the_api_server_is_reachable_and_by_default_only_locally() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"api"}
    assert SERVICES["api"]["ports"] == ["${LORRY_LISTEN:-127.0.0.1:8000}:8000"]
    assert COMPOSE["networks"]["inner"] == {"internal": True}
    for name in ("postgres", "redis", "store"):
        assert SERVICES[name]["networks"] == ["inner"]


def test_every_image_names_its_version_and_all_but_pythons_their_digest() -> None:
    bases = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    images = [service["image"] for name, service in SERVICES.items() if name not in OURS] + bases

    for image in images:
        if image != "python":  # the stage of this name
            digest = "" if image.startswith("python:") else "@sha256:[0-9a-f]{64}"
            assert re.search(rf":v?\d+(\.\d+)+[\w.-]*{digest}$", image), image


def test_the_compose_file_contains_no_secret() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable):
                assert re.fullmatch(r"\$\{\w+:(\?[^}]+|-)\}", value), f"{name}: {variable}"
        for text in texts(service):
            for password in re.findall(r"://[^/@\s]*:([^/@\s]+)@", text):
                assert password.startswith("${"), f"{name}: {text}"


@pytest.mark.parametrize(
    ("files", "profiles"),
    [
        *((["docker-compose.yml"], profiles) for profiles in ("", "cpu", "gpu", "cpu,gpu,backup")),
        *((["docker-compose.yml", "deploy/compose/head.yml"], profiles) for profiles in ("", "cpu", "gpu")),
        (["deploy/compose/worker.yml"], ""),
    ],
)
def test_docker_accepts_every_combination_of_files(files: list[str], profiles: str) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs docker compose")
    text = "".join((ROOT / file).read_text("utf-8") for file in files)
    required = {found["name"]: "10.0.0.1" for found in VARIABLE.finditer(text) if found["kind"] == "?"}
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "COMPOSE_PROFILES": profiles}
    argv = [docker, "compose", *(word for file in files for word in ("-f", file)), "config", "--quiet"]

    refused = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    done = subprocess.run(argv, cwd=ROOT, env=environment | required, capture_output=True, text=True, check=False)

    assert refused.returncode != 0, "required variables are missing"
    assert (done.returncode, done.stderr) == (0, "")


def test_the_example_names_every_variable_and_contains_no_secret() -> None:
    used = {found["name"]: found["kind"] for text in texts(COMPOSE) for found in VARIABLE.finditer(text)}
    named = example()

    assert named.pop("COMPOSE_PROFILES") == "gpu"
    assert used.keys() - REPLACED == named.keys()
    for name, kind in ((name, used[name]) for name in named):
        assert (named[name] == "") == (kind == "?"), name


def test_git_ignores_what_an_operator_adds() -> None:
    added = {".env", "models/", "backups/", "docker-compose.override.yml"}

    assert added <= set((ROOT / ".gitignore").read_text("utf-8").splitlines())


def test_every_setting_exists() -> None:
    known = {f"LORRY_{field}".upper() for settings in (Settings, ApiSettings) for field in settings.model_fields}

    for name, service in SERVICES.items():
        given = {key for key in service.get("environment", {}) if key.startswith(("LORRY_", "OTEL_"))}
        assert given <= known | {"LORRY_DEVICE", logs.FORMAT} | vars(of_opentelemetry).keys(), name


def test_logs_and_traces_can_be_enabled_and_only_the_api_has_the_pepper() -> None:
    ours = {name for name in OURS if "LORRY_DATA_DIR" in SERVICES[name]["environment"]}

    assert ours == OURS - {"store"}
    for name in ours:
        assert {"LORRY_LOG_FORMAT", "OTEL_EXPORTER_OTLP_ENDPOINT"} <= SERVICES[name]["environment"].keys(), name
    for pepper in ("LORRY_PEPPER", "LORRY_PREVIOUS_PEPPER"):
        assert {name for name in ours if pepper in SERVICES[name]["environment"]} == {"bootstrap", "api", "restore"}


def role(name: str) -> str:
    """Return the database role of a service."""
    return str(urlsplit(SERVICES[name]["environment"]["LORRY_DATABASE_URL"].replace(":?set it in .env", "")).username)


def test_each_service_has_the_database_role_that_it_needs() -> None:
    roles = {name: role(name) for name in OURS if "LORRY_DATABASE_URL" in SERVICES[name].get("environment", {})}

    assert roles == {
        "bootstrap": "lorry_owner",
        "restore": "lorry_owner",
        "api": API_ROLE,
        "backup": API_ROLE,
        "worker-cpu": WORKER_ROLE,
        "worker-gpu": WORKER_ROLE,
    }
    for name, its_role in roles.items():
        secrets = {found["name"] for text in texts(SERVICES[name]["environment"]) for found in VARIABLE.finditer(text)}
        passwords = {secret for secret in secrets if secret.startswith("POSTGRES_")}
        assert passwords == {f"POSTGRES_{its_role.removeprefix('lorry_').upper()}_PASSWORD"}, name


@pytest.mark.timeout(120)
def test_the_roles_script_is_idempotent_and_grants_each_role_its_rights(new_postgres_url: str) -> None:
    """The database exists already, and another role owns its tables."""
    psql = find_postgres()
    assert psql is not None
    url = make_url(new_postgres_url).set(drivername="postgresql")
    before = Database(new_postgres_url)
    before.migrate()
    before.close()
    script = ROOT / "deploy" / "postgres" / "roles.sql"
    argv = [str(psql.parent / "psql"), "-f", str(script), url.render_as_string(hide_password=False)]
    passwords = {f"POSTGRES_{name.upper()}_PASSWORD": f"it's-{name}" for name in ("owner", "api", "worker")}
    refused = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "Set POSTGRES_OWNER_PASSWORD" in refused.stderr
    for _ in range(2):
        done = subprocess.run(argv, check=False, capture_output=True, text=True, env={**os.environ, **passwords})
        assert done.returncode == 0, done.stderr

    owner = Database(as_role(new_postgres_url, "lorry_owner"))
    owner.migrate()
    owner.close()

    made = {}
    for name in ("lorry_owner", API_ROLE, WORKER_ROLE):
        with psycopg.connect(url.set(username=name).render_as_string(hide_password=False)) as connection:
            reads = "select has_table_privilege('jobs', 'select'), has_table_privilege('api_keys', 'select'),"
            found = connection.execute(f"{reads} has_schema_privilege('public', 'create')".encode()).fetchone()
            made[name] = found
    assert made == {"lorry_owner": (True, True, True), API_ROLE: (True, True, False), WORKER_ROLE: (True, False, False)}
    for target in ("api", "worker"):
        assert f"requirements/{target}.lock" in dockerfile_targets()[target]
        assert "opentelemetry-sdk==" in (ROOT / "requirements" / f"{target}.lock").read_text("utf-8")


def command(name: str) -> list[str]:
    """Return the command of a service, by default that of its image."""
    if "command" in SERVICES[name] or "build" not in SERVICES[name]:
        given = SERVICES[name].get("command", [])
        return given.split() if isinstance(given, str) else given
    (of_image,) = re.findall(r"^CMD (.*)$", dockerfile_targets()[SERVICES[name]["build"]["target"]], re.MULTILINE)
    return json.loads(of_image)


def modules(name: str) -> set[str]:
    """Return the modules that the service's command and its health check run."""
    lines = [command(name), SERVICES[name].get("healthcheck", {}).get("test", [])]
    return {after for argv in lines for flag, after in pairwise(argv) if flag == "-m"}


def test_commands_name_modules_that_exist() -> None:
    named = {name: modules(name) for name in SERVICES}

    assert named["api"] == named["bootstrap"] == named["backup"] == named["restore"] == {"api"}
    assert named["worker-cpu"] == {"worker.entrypoints.celery_worker"}
    assert named["worker-gpu"] == {"worker.entrypoints.node_supervisor"}
    for module in set().union(*named.values()):
        assert find_spec(module) is not None, module


@pytest.mark.parametrize("name", ["api", "bootstrap", "backup", "restore"])
def test_the_commands_of_the_api_server_are_valid(name: str) -> None:
    assert api_parser().parse_args(SERVICES[name]["command"][3:]).run


def test_inline_programs_parse() -> None:
    for service in SERVICES.values():
        argv = service.get("healthcheck", {}).get("test", [])
        if "-c" in argv:
            ast.parse(argv[argv.index("-c") + 1])


def test_profiles_differ_only_in_the_device() -> None:
    cpu, gpu = dict(SERVICES["worker-cpu"]), dict(SERVICES["worker-gpu"])

    assert (cpu.pop("profiles"), gpu.pop("profiles")) == (["cpu"], ["gpu"])
    assert gpu.pop("deploy")["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert cpu["environment"].pop("LORRY_DEVICE") == "cpu"
    assert gpu["environment"].pop("LORRY_DEVICE") == "${LORRY_DEVICE:-}"
    assert "node_supervisor" in gpu.pop("command")
    for built in (cpu, gpu):
        built.pop("build")
        built.pop("image")
    assert cpu == gpu


def test_workers_mount_the_models_read_only_and_need_no_folder() -> None:
    """Docker creates the missing folder of a mount in the short form. `create_host_path: false` would require it."""
    separate = yaml.safe_load((ROOT / "deploy" / "compose" / "worker.yml").read_text("utf-8"))["services"]["worker"]
    workers = [(".", SERVICES["worker-cpu"]), (".", SERVICES["worker-gpu"]), ("../..", separate)]

    for folder, service in workers:
        assert f"${{LORRY_MODELS_DIR:-{folder}/models}}:/models:ro" in service["volumes"]


def dockerfile_targets() -> dict[str, str]:
    """Return the text of each target, including that of the target it builds on."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    found: dict[str, str] = {}
    for source, name, body in re.findall(r"^FROM (\S+) AS (\w+)\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL):
        found[name] = found.get(source, "") + body
    return found


def test_images_are_built_from_existing_files_and_do_not_run_as_root() -> None:
    targets = dockerfile_targets()
    wanted = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    allowed = (ROOT / ".dockerignore").read_text("utf-8").splitlines()

    assert wanted <= targets.keys()
    for name in wanted:
        last_user = re.findall(r"^USER (\S+)", targets[name], re.MULTILINE)[-1]
        assert last_user in ("lorry", "10001:10001")
    assert allowed[0] == "*"
    for source in (line.removeprefix("!") for line in allowed if line.startswith("!")):
        assert (ROOT / source).exists(), source
    packages = re.findall(r'"(\w+)\*"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert {f"!{package}" for package in packages} <= set(allowed)


class Stack:
    """The services as processes: their own commands and environment, with this machine's addresses."""

    def __init__(self, folder: Path, addresses: dict[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        self._addresses = addresses

    def environment(self, name: str) -> dict[str, str]:
        given = {key: self._fill(str(value)) for key, value in SERVICES[name]["environment"].items()}
        its_role = role(name) if "LORRY_DATABASE_URL" in given else None
        database = as_role(self._addresses["LORRY_DATABASE_URL"], None if its_role == "lorry_owner" else its_role)
        here = {**self._addresses, "LORRY_DATABASE_URL": database}
        return {**given, "LORRY_DATA_DIR": str(self.folder / name), **here, "TMPDIR": str(self.folder)}

    def argv(self, argv: list[str]) -> list[str]:
        here = {
            "8000": str(self.port),
            "0.0.0.0": "127.0.0.1",
            "/tmp": str(self.folder),
            "/backups": str(self.folder / "backups"),
        }
        program, *rest = [self._fill(word) for word in argv]
        for there, instead in here.items():
            rest = [word.replace(there, instead) for word in rest]
        return [
            *{"python": [sys.executable]}.get(program, [program]),
            *rest,
        ]

    def _fill(self, text: str) -> str:
        filled = VARIABLE.sub(lambda m: m["rest"] if m["kind"] == "-" else FILLED, text)
        return filled.replace("$$", "$")

    def run(self, name: str, argv: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment(name)}
        return subprocess.run(
            self.argv(argv), env=environment, cwd=ROOT, check=False, capture_output=True, text=True, timeout=250
        )

    def is_healthy(self, name: str) -> bool:
        kind, *argv = SERVICES[name]["healthcheck"]["test"]
        return self.run(name, ["sh", "-c", *argv] if kind == "CMD-SHELL" else argv).returncode == 0

    def start(self, name: str) -> Any:
        """Return a context manager that runs the service. Its block starts when the service's health check passes."""
        environment = [f"{key}={value}" for key, value in self.environment(name).items()]
        return running(
            ["env", *environment, *self.argv(command(name))],
            log=self.folder / f"{name}.log",
            is_ready=lambda: self.is_healthy(name),
        )


@pytest.fixture
def stack(tmp_path: Path, new_postgres_url: str, redis_url: str, s3_endpoint: str) -> Stack:
    bucket = new_bucket(s3_endpoint)
    addresses = {
        "LORRY_DATABASE_URL": new_postgres_url,
        "LORRY_REDIS_URL": redis_url,
        "LORRY_STORE_URL": f"s3://{bucket.name}",
        **bucket.environment(),
    }
    return Stack(tmp_path, addresses)


@pytest.mark.slow
def test_the_services_start_in_order_as_processes(stack: Stack) -> None:
    assert not stack.is_healthy("worker-cpu")

    first = stack.run("bootstrap", SERVICES["bootstrap"]["command"])
    again = stack.run("bootstrap", SERVICES["bootstrap"]["command"])

    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["api_key"].startswith("lorry_")
    assert json.loads(again.stdout) == {"created": False, "api_key": None}
    with stack.start("api"), stack.start("worker-cpu"):
        assert stack.is_healthy("api")
        assert stack.is_healthy("worker-cpu")
        copied = stack.run("backup", SERVICES["backup"]["command"])
        assert (copied.returncode, "Backup " in copied.stdout) == (0, True), copied.stderr
    assert len(list((stack.folder / "backups" / "backups").iterdir())) == 1
    assert not stack.is_healthy("api")

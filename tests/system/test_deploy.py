"""deploy/ as text: systemd units, additional compose files and Kubernetes manifests match the code.

Nothing is deployed: no cluster and no Docker engine take part.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from configparser import RawConfigParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from opentelemetry.sdk import environment_variables as of_opentelemetry

from api.__main__ import _parser as api_parser
from api.settings import ApiSettings
from catalog import logs
from catalog.settings import Settings
from lorry.cli.main import app as lorry_app
from worker.context.context import WorkerContext

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
USER_UNIT = DEPLOY / "systemd-user/lorry.service"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS: list[dict[str, Any]] = [
    manifest
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text("utf-8"))
]
SETTINGS = {f"LORRY_{name}".upper() for kind in (Settings, ApiSettings) for name in kind.model_fields}
KNOWN = SETTINGS | {"LORRY_DEVICE", logs.FORMAT}
TIME_TO_LEAVE = 90
"""Seconds that a worker has to exit, in every file that states them."""
DRAIN_SECONDS = WorkerContext.__dataclass_fields__["drain_limit_seconds"].default
SECRETS = re.compile(r"PASSWORD|SECRET|PEPPER|ACCESS_KEY|(DATABASE|REDIS)_URL")
EACH_UNIT = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)


class Unit(RawConfigParser):
    """A systemd unit. The parser keeps the last value of a key that occurs twice; `text` has all values."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]
        self.text = path.read_text("utf-8")
        self.read_string(self.text)

    def one(self, name: str) -> str:
        return self["Service"].get(name, "")

    def command(self) -> list[str]:
        """Return the command, with WORKERS replaced by the words of the unit's own example."""
        line = self.one("ExecStart").replace("${BACKUP_PLACE}", "place").replace("%%", "%")
        if example := re.search(r'^#   WORKERS="(.*)"$', self.text, re.MULTILINE):
            line = line.replace("$WORKERS", example[1])
        return line.split()


def check_command(argv: list[str]) -> None:
    """Assert that the code accepts this command."""
    if argv[1:4] == ["-P", "-m", "worker.entrypoints.celery_worker"]:
        assert all(option.startswith("--hostname=") for option in argv[4:])
    elif argv[0].endswith("/lorry"):
        assert lorry_parsed(argv[1:])
    else:
        assert argv[1:3] == ["-m", "api"]
        assert api_parser().parse_args(argv[3:]).run


def lorry_parsed(words: Sequence[str]) -> dict[str, Any]:
    """Return the options that `lorry` parses. Raises click's UsageError."""
    name, *options = words
    command: Any = typer.main.get_command(lorry_app)
    return command.commands[name].make_context(name, list(options)).params


def templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and pod template of every workload."""
    for manifest in MANIFESTS:
        spec = manifest.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield manifest["metadata"]["name"], spec["template"]


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield name, pod and container of every workload."""
    for name, template in templates():
        for container in template["spec"]["containers"]:
            yield name, template["spec"], container


def optional(path: Path) -> list[dict[str, Any]]:
    """Return the manifests of a file, including its optional parts in comments."""
    return list(yaml.safe_load_all(path.read_text("utf-8").replace("#? ", "")))


def named(kind: str, name: str) -> dict[str, Any]:
    return next(m for m in MANIFESTS if m["kind"] == kind and m["metadata"]["name"] == name)


# systemd


@EACH_UNIT
def test_a_unit_runs_a_valid_command_as_a_user_that_writes_one_folder(unit: Path) -> None:
    read = Unit(unit)

    check_command(read.command())
    assert read.one("User") == "lorry"
    assert read.one("NoNewPrivileges") == "yes"
    assert read.one("ProtectSystem") == "strict"
    assert re.findall(r"^ReadWritePaths=-?(\S+)$", read.text, re.MULTILINE)[-1] == "/var/lib/lorry"
    assert "EnvironmentFile=/etc/lorry/lorry.env" in read.text
    assert not SECRETS.search(" ".join(re.findall(r"^Environment=(.*)$", read.text, re.MULTILINE)))


@pytest.mark.parametrize("name", ["lorry-worker@.service", "lorry-workers.service"])
def test_a_stopping_worker_has_time_and_its_trainer_receives_no_signal(name: str) -> None:
    worker = Unit(DEPLOY / "systemd" / name)

    assert worker.one("KillMode") == "mixed"
    assert int(worker.one("TimeoutStopSec")) == TIME_TO_LEAVE >= 1.5 * DRAIN_SECONDS
    assert worker.one("OOMPolicy") == "continue", (
        "otherwise systemd stops the worker when the kernel has killed its trainer"
    )


def test_worker_groups_are_those_of_the_file_or_one_per_gpu() -> None:
    one = Unit(DEPLOY / "systemd" / "lorry-worker@.service")
    all_of_it = Unit(DEPLOY / "systemd" / "lorry-workers.service")

    assert "LORRY_DEVICE=%i" in one.one("Environment")
    assert "LORRY_DEVICE" not in all_of_it.text, "lorry worker sets it for each worker"
    parsed = lorry_parsed(all_of_it.command()[1:])
    assert [*parsed["groups"], *parsed["more"]] == ["0,1", "2", "3"]
    nothing_named = [word for word in all_of_it.one("ExecStart").split()[1:] if word != "$WORKERS"]
    assert not lorry_parsed(nothing_named)["groups"]
    assert "EnvironmentFile=-/etc/lorry/workers.env" in all_of_it.text
    assert [line for line in one.text.splitlines() if line.startswith(("Protect", "Restrict", "Private"))] == [
        line for line in all_of_it.text.splitlines() if line.startswith(("Protect", "Restrict", "Private"))
    ]


@pytest.mark.parametrize("page", ["deploy", "multi-gpu", "drain-and-cordon", "upgrade"])
def test_pages_state_the_time_that_a_worker_has_to_exit(page: str) -> None:
    text = (ROOT / f"docs/how-to/{page}.md").read_text("utf-8")
    pattern = r"TimeoutStopSec=(\d+)|stop_grace_period: (\d+)s|Give a worker (\d+)|a worker has \[?(\d+) seconds"

    found = [int(seconds) for match in re.findall(pattern, text, re.IGNORECASE) for seconds in match if seconds]

    assert set(found) == {TIME_TO_LEAVE}


def test_the_api_unit_allows_twice_the_shutdown_time_of_the_settings() -> None:
    api = Unit(DEPLOY / "systemd" / "lorry-api.service")

    assert int(api.one("TimeoutStopSec")) >= 2 * ApiSettings().shutdown_seconds


def test_systemd_accepts_every_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    for path in (DEPLOY / "systemd").iterdir():
        text = path.read_text("utf-8").replace("/opt/lorry/.venv/bin/python", sys.executable)
        text = text.replace("/opt/lorry/.venv/bin/lorry", f"{sys.executable} -m lorry").replace("/opt/lorry", str(ROOT))
        (tmp_path / path.name.replace("@.", "@0.")).write_text(text)

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )

    messages = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "lorry-" in line]
    assert (done.returncode, messages) == (0, [])


def test_the_user_unit_saves_jobs_and_stops_after_lorry_down() -> None:
    unit = Unit(USER_UNIT)

    check_command(unit.command())
    assert unit.one("KillMode") == "mixed"
    assert int(unit.one("TimeoutStopSec")) == TIME_TO_LEAVE
    assert unit.one("OOMPolicy") == "continue"
    assert unit.one("Restart") == "on-failure", "`lorry down` ends the process with status 0"


def test_systemd_accepts_the_user_unit_as_the_page_installs_it(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    page = (ROOT / "docs/how-to/autostart.md").read_text("utf-8")
    install = next(line.strip() for line in page.splitlines() if line.strip().startswith("sed "))
    source, home, run = tmp_path / "source", tmp_path / "home", tmp_path / "run"
    (source / ".venv/bin").mkdir(parents=True)
    (source / ".venv/bin/lorry").symlink_to(sys.executable)
    (source / "deploy").symlink_to(DEPLOY)
    (home / ".config/systemd/user").mkdir(parents=True)
    run.mkdir(mode=0o700)
    env = os.environ | {"HOME": str(home), "XDG_RUNTIME_DIR": str(run)}

    subprocess.run(["bash", "-ec", install], cwd=source, env=env, check=True)
    unit = home / ".config/systemd/user/lorry.service"
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        env=env,
        timeout=250,
        check=False,
    )

    assert f"ExecStart={source}/.venv/bin/lorry up" in unit.read_text("utf-8")
    messages = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "lorry" in line]
    assert (done.returncode, messages) == (0, [])


# Docker on several machines


def test_a_remote_worker_equals_the_compose_worker_except_its_addresses() -> None:
    there = yaml.safe_load((DEPLOY / "compose" / "worker.yml").read_text("utf-8"))["services"]["worker"]
    here = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["worker-gpu"]

    for key in there.keys() - {"build", "hostname", "environment", "ports", "volumes"}:
        assert there[key] == here[key], key
    assert there["stop_grace_period"] == f"{TIME_TO_LEAVE}s"
    assert there["environment"].keys() - {"LORRY_INFERENCE_ADDRESS"} == here["environment"].keys()
    (ports,) = there["ports"]
    assert ports.startswith(there["environment"]["LORRY_INFERENCE_ADDRESS"])
    assert there["hostname"].startswith("${WORKER_NAME:?"), "cordons belong to it"


def test_the_first_machine_is_reachable_only_at_its_private_address() -> None:
    head = yaml.safe_load((DEPLOY / "compose" / "head.yml").read_text("utf-8"))
    here = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))

    assert head["services"].keys() == {"postgres", "redis", "store"}
    for name, service in head["services"].items():
        assert service.keys() == {"ports", "networks"}
        assert all(port.startswith("${PRIVATE_ADDRESS:?") for port in service["ports"])
        assert set(service["networks"]) <= here["networks"].keys() | head["networks"].keys(), name


@pytest.mark.parametrize("path", sorted((DEPLOY / "compose").glob("*.yml")), ids=lambda path: path.name)
def test_no_compose_file_contains_a_secret(path: Path) -> None:
    for service in yaml.safe_load(path.read_text("utf-8"))["services"].values():
        for name, value in service.get("environment", {}).items():
            if SECRETS.search(name):
                assert "${" in str(value), name
        assert all(secret.startswith("$") for secret in re.findall(r"://[^/@\s]*:([^/@\s]+)@", str(service)))


# Kubernetes


def test_every_pod_runs_a_valid_command_without_privileges() -> None:
    assert {name for name, _, _ in containers()} == {"migrate", "api", "worker", "backup"}
    for name, pod, container in containers():
        if "command" in container:  # otherwise that of the image
            check_command(container["command"])
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001, "the Dockerfile's user"
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        given = {volume["name"] for volume in pod["volumes"]} | {"data"}
        assert {mount["name"] for mount in container["volumeMounts"]} <= given


def test_manifests_set_existing_variables_and_contain_no_secret() -> None:
    names = set(named("ConfigMap", "lorry")["data"])
    for _, _, container in containers():
        names |= {variable["name"] for variable in container.get("env", ())}

    assert {name for name in names if name.startswith("LORRY_")} <= KNOWN
    assert "LORRY_LOG_FORMAT" in names
    commented = re.findall(r"^  # (OTEL_\w+):", (DEPLOY / "kubernetes" / "lorry.yaml").read_text("utf-8"), re.MULTILINE)
    assert [name for name in commented if name in vars(of_opentelemetry)] == ["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert not any(SECRETS.search(name) for name in named("ConfigMap", "lorry")["data"])
    assert not any(manifest["kind"] == "Secret" for manifest in MANIFESTS)


def test_only_the_api_has_the_pepper_and_each_pod_has_its_database_role() -> None:
    secrets: dict[str, list[str]] = {}
    for name, _, container in containers():
        secrets[name] = [given["secretRef"]["name"] for given in container["envFrom"] if "secretRef" in given]
        named_alone = {variable["name"] for variable in container.get("env", ()) if "valueFrom" in variable}
        assert named_alone <= ({"LORRY_DATABASE_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}), name
        assert not any(variable["name"] == "LORRY_PEPPER" for variable in container.get("env", ()))
    # If two secrets set a variable, the last one applies.
    assert secrets == {"migrate": ["lorry", "lorry-owner"], "api": ["lorry"], "worker": ["lorry-worker"], "backup": []}


def test_a_worker_pod_has_one_gpu_and_time_to_drain() -> None:
    pod = named("StatefulSet", "worker")["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "LORRY_DEVICE", "value": "0"} in container["env"]
    assert pod["terminationGracePeriodSeconds"] == TIME_TO_LEAVE
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["worker-gpu"]["healthcheck"]
    *_, command = container["livenessProbe"]["exec"]["command"]
    assert compose["test"] == ["CMD-SHELL", command.replace("$", "$$")]
    seconds = container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"]
    assert seconds >= 600, "a database outage must not restart the fleet"


def test_the_api_is_alive_without_a_database_and_ready_only_with_one() -> None:
    (container,) = named("Deployment", "api")["spec"]["template"]["spec"]["containers"]

    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    port = dict(pairwise(container["command"]))["--port"]
    assert container["ports"] == [{"name": "http", "containerPort": int(port)}]


def test_workers_accept_inference_requests_at_a_fixed_port() -> None:
    (container,) = named("StatefulSet", "worker")["spec"]["template"]["spec"]["containers"]

    (address,) = (each["value"] for each in container["env"] if each["name"] == "LORRY_INFERENCE_ADDRESS")
    assert container["ports"] == [{"name": "inference", "containerPort": int(address.removeprefix(":"))}]


def test_selectors_match_their_pods_and_only_the_api_and_the_workers_are_reachable() -> None:
    pods = [template["metadata"]["labels"] for _, template in templates()]
    for manifest in MANIFESTS:
        spec = manifest.get("spec", {})
        wanted = spec.get("selector") or spec.get("podSelector") or {}
        wanted = wanted.get("matchLabels", wanted if manifest["kind"] == "Service" else {})
        assert any(wanted.items() <= labels.items() for labels in pods), manifest["metadata"]
    policies = [m for m in MANIFESTS if m["kind"] == "NetworkPolicy"]
    closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert any(policy["spec"] == closed for policy in policies)
    open_to = [policy["metadata"]["name"] for policy in policies if "ingress" in policy["spec"]]
    assert open_to == ["api", "worker"]
    assert {m["metadata"]["name"] for m in MANIFESTS if m["kind"] == "PodDisruptionBudget"} == {"api", "worker"}


def test_prometheus_reaches_the_api_and_optional_policies_exist() -> None:
    path = DEPLOY / "kubernetes" / "network.yaml"
    (api,) = [policy for policy in optional(path) if policy["metadata"]["name"] == "api"]
    workers = {"podSelector": {"matchLabels": {"app": "lorry", "part": "worker"}}}
    namespaces = [
        rule["from"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for rule in api["spec"]["ingress"]
    ]
    assert namespaces == ["ingress-nginx", "monitoring"]
    opened = {policy["metadata"]["name"]: policy["spec"] for policy in optional(path)}
    of_api = {"podSelector": {"matchLabels": {"app": "lorry", "part": "api"}}}
    inference = {"from": [of_api], "ports": [{"protocol": "TCP", "port": "inference"}]}
    assert opened["worker"]["ingress"] == [inference]
    ports = [port["port"] for rule in opened["out"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 5432, 6379, 8001, 443, 4318]
    assert opened["gang"]["podSelector"] == workers["podSelector"]
    assert (opened["gang"]["ingress"], opened["gang"]["egress"]) == ([{"from": [workers]}], [{"to": [workers]}])
    as_it_stands = {policy["metadata"]["name"] for policy in yaml.safe_load_all(path.read_text("utf-8"))}
    assert as_it_stands == {"nothing", "api", "worker", "out"}


def test_backups_do_not_overlap_and_are_not_in_the_services_own_bucket() -> None:
    cron = named("CronJob", "backup")["spec"]
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    place = api_parser().parse_args(pod["containers"][0]["command"][3:]).place

    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 18 * 3600, "decision 0014"
    assert place.startswith("s3://")
    assert place.split("/")[2] != named("ConfigMap", "lorry")["data"]["LORRY_STORE_URL"].split("/")[2]
    assert pod["restartPolicy"] == "Never"


def test_images_name_their_version() -> None:
    assert all(re.search(r":\d+\.\d+\.\d+$", container["image"]) for _, _, container in containers())

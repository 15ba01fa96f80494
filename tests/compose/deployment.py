"""A copy of the checkout in which the commands of the guides run, with stand-ins for the base images."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tests.compose import base_images
from tests.docs.interpreters import environment
from tests.docs.pages import ROOT, Block, blocks, pages
from tests.services.running import free_port

REASON = "needs Docker"
"""Why the guides mark these blocks as not run: they run here."""
OURS = ("bootstrap", "api", "worker-cpu")
"""Services that log in Lorry's format."""
WAIT_SECONDS = 600.0
ADDRESS = "127.0.0.1:8000"
"""Address of the API server in the guides."""
REHEARSAL = "rehearsal"
"""Name of the project in which the guides rehearse a restore."""


class CommandFailed(AssertionError):
    """A command of a guide, or of a check, failed."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One Compose project in the copy of the checkout."""

    folder: Path
    env: dict[str, str]
    has_run: set[str] = field(default_factory=set)
    """Texts of the guides' blocks that have run."""
    logged: list[str] = field(default_factory=list)
    """Log lines of containers that no longer exist."""

    def guide(self, text: str, *, stdin: str = "") -> str:
        """Run the block of the guides that is `text`, or else the one that contains it. Returns the output, including
        stderr."""
        texts = {block.text for block in guide_blocks()}
        (found,) = {f"{text}\n"} & texts or {block for block in texts if text in block}
        self.has_run.add(found)
        script = found.replace(ADDRESS, self.env["LORRY_LISTEN"])
        return self.shell(re.sub(rf"\b{REHEARSAL}\b", self.env["COMPOSE_PROJECT_NAME"], script), stdin=stdin)

    def shell(self, script: str, *, stdin: str = "") -> str:
        """Run a script in the checkout, and return its output, including stderr. Raises CommandFailed."""
        print(f"$ {script.strip()}", flush=True)  # noqa: T201
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=self.folder,
            env=self.env,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(f"  … {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
        if done.returncode != 0:
            raise CommandFailed(f"{script}\nexit status {done.returncode}:\n{done.stdout[-6000:]}")
        return done.stdout

    def until(self, is_true: Callable[[], bool], what: str) -> None:
        """Wait. Raises CommandFailed with the last log lines if it takes longer than ten minutes."""
        end = time.monotonic() + WAIT_SECONDS
        while not is_true():
            if time.monotonic() > end:
                raise CommandFailed(f"not in time: {what}\n{self.shell('docker compose logs --no-color --tail 40')}")
            time.sleep(1)

    def container(self, service: str) -> str:
        """Return the ID of the service's container."""
        return self.shell(f"docker compose ps --quiet {service}").strip()

    def volumes(self) -> str:
        """Return the names of the project's volumes."""
        project = self.env["COMPOSE_PROJECT_NAME"]
        return self.shell(f"docker volume ls --quiet --filter label=com.docker.compose.project={project}")

    def wait_until_healthy(self, *services: str) -> None:
        for service in services:
            query = ["docker", "inspect", "-f", "{{.State.Health.Status}}", self.container(service)]
            self.until(
                lambda query=query: subprocess.check_output(query, text=True).strip() == "healthy",
                f"{service} is healthy",
            )

    def job(self, job_id: str) -> dict[str, Any]:
        return json.loads(
            subprocess.check_output(["lorry", "jobs", "show", job_id, "--json"], cwd=self.folder, env=self.env)
        )

    def collect_logs(self) -> None:
        """Keep the log lines of the containers that exist. Call it before they are removed."""
        for service in OURS:
            # `docker compose logs` of some versions begins each line with a control sequence.
            text = self.shell(f"docker compose ps --all --quiet {service} | xargs --no-run-if-empty -n 1 docker logs")
            self.logged.extend(line for line in text.splitlines() if '"api_key"' not in line)

    def beside(self, project: str, subnet: str) -> Deployment:
        """Return another project on this machine."""
        home = self.folder.parent / project
        home.mkdir()
        listen = f"127.0.0.1:{free_port()}"
        own = {"COMPOSE_PROJECT_NAME": project, "LORRY_LISTEN": listen, "LORRY_SUBNET": subnet, "HOME": str(home)}
        return replace(self, env={**self.env, **own})

    def remove(self) -> None:
        """Remove containers, networks and volumes."""
        argv = ["docker", "compose", "down", "--volumes", "--timeout", "10", "--remove-orphans"]
        subprocess.run(argv, cwd=self.folder, env=self.env, capture_output=True, check=False)


def guide_blocks() -> list[Block]:
    """Return the blocks of the guides that run here."""
    return [block for page in pages() for block in blocks(page) if block.not_run == REASON]


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """Yield a project without containers, and remove it at the end. Raises Missing."""
    wheel = base_images.build()
    checkout, home = folder / "lorry", folder / "home"
    home.mkdir()
    _copy_checkout(checkout)
    (checkout / "requirements" / "torch-cpu.lock").write_text(base_images.lock_of(wheel))
    (checkout / "docker-compose.override.yml").write_text(_override(checkout))
    (folder / "bin").mkdir()
    if os.geteuid() == 0:  # root may have no sudo
        (folder / "bin" / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
        (folder / "bin" / "sudo").chmod(0o755)
    env = environment(home, ROOT)
    env |= {
        "PATH": f"{folder / 'bin'}:{env['PATH']}",
        "COMPOSE_PROJECT_NAME": "lorry-test",
        "COMPOSE_PROFILES": "cpu",
        "LORRY_LISTEN": f"127.0.0.1:{free_port()}",
        "LORRY_SUBNET": "172.31.253.0/24",
        "LORRY_LOG_FORMAT": "json",
        "BUILDKIT_PROGRESS": "plain",
    }
    del env["LORRY_DATA_DIR"]
    deployment = Deployment(folder=checkout, env=env)
    try:
        yield deployment
    finally:
        deployment.remove()


def _copy_checkout(target: Path) -> None:
    """Copy the files that git tracks or would track."""
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # tracked files may be deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def _override(checkout: Path) -> str:
    """Return the Compose file that replaces base images. A named build context replaces the image of its name."""
    named = re.findall(r"^FROM (\S+[:@]\S+) AS", (checkout / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    stand_ins: dict[str, str] = {}
    for image in named:
        short = next(stand_in for stand_in in base_images.IMAGES if stand_in in image)
        stand_ins[image] = f"docker-image://{base_images.name(short)}"
    built = {"build": {"additional_contexts": stand_ins}}
    services = {
        **{service: {"image": base_images.name(service)} for service in ("postgres", "redis")},
        **dict.fromkeys(("store", "bootstrap", "worker-cpu"), built),
    }
    return yaml.safe_dump({"services": services})

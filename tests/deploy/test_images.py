"""The worker image and the Compose files: what GPU kernels, gated models and several GPUs need there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from worker.entrypoints import node_supervisor
from worker.process.sandbox import KERNEL_CACHES, environment

ROOT = Path(__file__).parents[2]
COMPOSE = {"docker-compose.yml": ("worker-cpu", "worker-gpu"), "deploy/compose/worker.yml": ("worker",)}
HOME = "/var/lib/lorry"


def stage(name: str) -> str:
    """Return the instructions of one target of the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    return next(part for part in re.split(r"^FROM ", text, flags=re.MULTILINE) if re.match(rf"\S+ AS {name}\n", part))


def services(path: str) -> list[dict[str, Any]]:
    found = yaml.safe_load((ROOT / path).read_text("utf-8"))["services"]
    return [found[name] for name in COMPOSE[path]]


def test_only_worker_images_with_cuda_can_compile_the_launchers_of_triton() -> None:
    installed = stage("worker")

    assert re.search(r'if \[ "\$TORCH" = torch \]; then \\\n[^;]* gcc ', installed.replace("&&", ""))
    assert "libc6-dev" in installed.split()
    assert not {"gcc", "libc6-dev"} & set(stage("api").split())


@pytest.mark.skipif(
    not (shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="needs a C compiler and Python's headers",
)
@pytest.mark.parametrize("can_compile", [True, False])
def test_worker_image_that_cannot_compile_a_shared_object_is_not_built(can_compile: bool, tmp_path: Path) -> None:
    """Docker passes the command to the shell, as the user of the worker. No Docker engine takes part here."""
    _, as_worker = stage("worker").split("\nUSER lorry\n")
    (command,) = re.findall(r"^RUN (python <<'EOF'\n.*?^EOF$)", as_worker, re.MULTILINE | re.DOTALL)
    programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if not can_compile:
        (tmp_path / "cc").symlink_to("/bin/false")
        programs.insert(0, str(tmp_path))
    variables = {"PATH": ":".join(programs), "HOME": str(tmp_path), "TORCH": "torch"}

    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )

    assert (done.returncode == 0) == can_compile, done.stderr
    assert list((tmp_path / ".cache" / "lorry-kernels" / "triton").iterdir()) == []


@pytest.mark.parametrize("path", COMPOSE)
def test_compiled_kernels_are_kept_on_a_volume(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Docker mounts a tmpfs without the right to execute its files."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)

    assert all(Path(folder).is_relative_to(tmp_path) for folder in environment().values())
    assert f"HOME={HOME}" in stage("python").split()
    for service in services(path):
        assert any(volume.partition(":")[2] == HOME for volume in service["volumes"])
        assert not any(Path(HOME).is_relative_to(folder) for folder in service["tmpfs"])


@pytest.mark.parametrize("path", COMPOSE)
def test_workers_get_the_token_of_the_hub(path: str) -> None:
    for service in services(path):
        assert service["environment"]["HF_TOKEN"] == "${HF_TOKEN:-}"


@pytest.mark.parametrize("path", COMPOSE)
def test_compose_starts_one_worker_for_each_gpu(path: str) -> None:
    *_, gpu = services(path)
    program, *options, groups = gpu["command"].split()

    assert [program, *options] == ["python", "-P", "-m", node_supervisor.__name__]
    assert groups == "${LORRY_GROUPS:-}"
    (reserved,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert reserved["count"] == "all"


@pytest.mark.parametrize("name", ["api", "worker"])
def test_change_of_the_code_installs_no_packages(name: str) -> None:
    before, copied, after = stage(name).partition("\nCOPY . .\n")

    assert copied
    assert "--require-hashes" in before
    assert not re.search("--require-hashes|apt-get", after)

"""Builds stand-ins for Lorry's base images from Debian packages, for machines that reach no image registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

from tests.services.programs import CACHE, Missing

HERE = Path(__file__).parent
IMAGES = ("python", "postgres", "redis", "versitygw")
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
EXCLUDED = {"site-packages", "test", "__pycache__", "idlelib", "tkinter"}


def name(image: str) -> str:
    """Return the name of a stand-in on this machine."""
    return f"lorry-test/{image}"


def build() -> Path:
    """Build all stand-ins, and return the path of the wheel of torch, which the image `python` has in /wheels.

    Raises Missing.
    """
    context = CACHE / "base-images"
    context.mkdir(parents=True, exist_ok=True)
    for file in HERE.iterdir():
        if (file.is_file() and file.suffix != ".py") or file.name == "s3_server.py":
            shutil.copy(file, context)
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", context)
    if not (context / "root.tar").exists():
        _debian(context / "root.tar")
    _python(context / "python.tar")
    wheel = _torch(context)
    for image in IMAGES:
        _run(["docker", "buildx", "build", "--quiet", "--target", image, "--tag", name(image), str(context)])
    return wheel


def lock_of(wheel: Path) -> str:
    """Return the text of a lock file that installs the wheel in the stand-in."""
    digest = sha256(wheel.read_bytes()).hexdigest()
    return f"torch @ file:///wheels/{wheel.name.replace('+', '%2B')} \\\n    --hash=sha256:{digest}\n"


def _debian(path: Path) -> None:
    """Write Debian 13 with the packages of the variant minbase."""
    draft = path.with_suffix(".draft.tar")
    # apt compares signatures with the clock, which is not exact on every machine that runs tests.
    options = ["--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Check-Date false"]
    folders = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("man", "doc", "locale")]
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", *options, *folders]
    _run([*argv, "trixie", str(draft)])
    draft.replace(path)


def _python(path: Path) -> None:
    """Write the installation of the running interpreter without its packages, as in the official image."""
    prefix = Path(sys.base_prefix)
    if prefix == Path("/usr"):
        raise Missing("the stand-in of the Python image copies a Python outside /usr, for example one of uv or pyenv")

    def selected(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(info.name).parts
        is_script = parts[:1] == ("bin",) and len(parts) > 1 and not parts[1].startswith("python")
        info.uid = info.gid = info.mtime = 0
        return None if EXCLUDED & set(parts) or is_script or info.name.endswith(".a") else info

    with tarfile.open(path, "w") as archive:
        for folder in ("bin", "include", "lib"):
            archive.add(prefix / folder, arcname=folder, filter=selected)


def _torch(context: Path) -> Path:
    """Download the CPU wheel of the release that requirements/torch-cpu.lock has."""
    import torch

    if not list(context.glob("torch-*.whl")):
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(context)]
        try:
            _run([*argv, f"torch=={torch.__version__}"])
        except Missing:
            _run([*argv, f"torch=={torch.__version__}", "--index-url", CPU_WHEELS])
    (wheel,) = context.glob("torch-*.whl")
    return wheel


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "DOCKER_BUILDKIT": "1"})
    if done.returncode != 0:
        raise Missing(f"`{' '.join(argv[:3])} …` failed: {done.stderr[-1000:]}")

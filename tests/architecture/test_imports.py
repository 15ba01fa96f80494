"""The modules that a process loads when it imports a package, measured in a child interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.architecture.source_files import ROOT, source_files

TENSORS = {"torch", "transformers", "peft", "accelerate", "lora_core"}
LOAD_TENSORS = (
    "worker.children.trainer",
    "worker.children.base_importer",
    "worker.children.exporter",
    "migrations.env",
)
"""The only modules that import lora_core (see .importlinter), and one that runs a migration on import."""
SERVER = {"catalog", "api", "worker", "sqlalchemy", "celery", "fastapi", "alembic", "pydantic"}
IMPORT_ALL = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("package", ["api", "catalog", "lorry", "worker", "migrations"])
def test_no_torch_is_loaded_outside_the_trainer(package: str) -> None:
    loaded = _loaded_after_importing(_modules(package))

    assert package in loaded
    assert not loaded & TENSORS


def test_client_loads_no_server_modules() -> None:
    loaded = _loaded_after_importing(_modules("lorry"))

    assert not loaded & SERVER


def test_engine_loads_no_other_lorry_packages() -> None:
    loaded = _loaded_after_importing(["lora_core.config", "lora_core.errors", "lora_core.events"])

    assert not loaded & (SERVER | {"lorry", "torch"})


def _modules(package: str) -> list[str]:
    names = [
        source.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for source in source_files(package)
    ]
    return [
        name
        for name in names
        if not name.startswith(LOAD_TENSORS) and not name.endswith("__main__") and ".versions." not in name
    ]


def _loaded_after_importing(modules: list[str]) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))

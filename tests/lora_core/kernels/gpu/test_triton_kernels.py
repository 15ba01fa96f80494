"""The Triton kernels without a GPU: their values in Triton's interpreter, and their machine code for real devices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lora_core.kernels.gpu.triton_folder import VERSION, environment
from tests.services.programs import Missing

ROOT = Path(__file__).parents[4]
INTERPRETED = Path(__file__).parent / "interpreted"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory of a program on A100 and H100."""
MATRIX_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async"}


@pytest.fixture(scope="module")
def with_triton() -> Callable[..., dict[str, str]]:
    try:
        environment()
    except Missing as missing:
        pytest.skip(str(missing))
    return environment


def test_tested_version_is_that_of_the_worker_image() -> None:
    assert f"\ntriton=={VERSION} " in (ROOT / "requirements" / "torch.lock").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("module", sorted(path.name for path in INTERPRETED.glob("test_*.py")))
def test_kernels_compute_the_reference_in_the_interpreter(
    with_triton: Callable[..., dict[str, str]], module: str
) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED / module)]

    done = subprocess.run(
        command, cwd=ROOT, env=with_triton(TRITON_INTERPRET="1"), capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_fit_the_device_and_use_its_wide_instructions(
    with_triton: Callable[..., dict[str, str]], capability: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "tests.lora_core.kernels.gpu.compile_kernels", str(capability)]

    done = subprocess.run(command, cwd=ROOT, env=with_triton(), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    with capsys.disabled():
        sys.stdout.write(table(capability, variants))
    assert variants
    for variant in variants:
        assert variant["spilled_bytes"] == 0, variant
        assert variant["shared_bytes"] <= SHARED_BYTES[capability], variant
        instruction = MATRIX_INSTRUCTIONS[capability if variant["has_64_rows"] else 80]
        assert not variant["is_product"] or variant["instructions"].get(instruction), variant
        assert not variant["name"].startswith("AdamW") or variant["inexact"] == 0, variant
        assert not variant["is_wide"] or (variant["wide_loads"] > 0 and variant["narrow_loads"] == 0), variant


def table(capability: int, variants: list[dict[str, object]]) -> str:
    lines = [f"\ncompute capability {capability / 10}: registers, shared bytes, spilled bytes"]
    for variant in variants:
        figures = "{registers:>4} {shared_bytes:>7} {spilled_bytes:>3}".format_map(variant)
        lines.append(f"  {variant['name']!s:<54} {figures}")
    return "\n".join(lines) + "\n"

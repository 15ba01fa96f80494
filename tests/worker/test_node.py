"""What a worker takes itself to have: GPUs by number, and memory that is really free."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from worker import node

GIB = 2**30


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML of a machine with three GPUs."""

    def memory_info(_: int) -> Any:
        return SimpleNamespace(total=80 * GIB, free=79 * GIB)

    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,  # pyright: ignore[reportUnknownLambdaType]
        nvmlDeviceGetName=lambda index: f"GPU {index}",  # pyright: ignore[reportUnknownLambdaType]
        nvmlDeviceGetMemoryInfo=memory_info,
        nvmlDeviceGetCudaComputeCapability=lambda index: (7 + index, 5),  # pyright: ignore[reportUnknownLambdaType]
    )
    monkeypatch.setattr(node, "open_nvml", lambda: nvml)


@pytest.mark.usefixtures("three_gpus")
def test_a_gpu_is_the_first_that_its_trainer_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    chosen = node.choose_device("2")

    assert (chosen.index, chosen.torch_name()) == (2, "cuda:0")


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(("visible", "found"), [("2,0", [2, 0]), ("1,7,0", [1]), ("-1", []), ("", []), ("0,-1,2", [0])])
def test_only_visible_gpus_are_there(monkeypatch: pytest.MonkeyPatch, visible: str, found: list[int]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    devices = node.find_devices()

    assert [device.index for device in devices if device.kind == "cuda"] == found


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize("name", ["GPU-8f2a", "MIG-5c1b"])
def test_a_gpu_by_another_name_than_its_number_is_refused_not_ignored(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"0,{name}")

    with pytest.raises(SystemExit, match=name):
        node.choose_device(None)


def test_page_cache_of_a_container_counts_as_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{7 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2 * GIB}\nactive_file {GIB}\ninactive_file {4 * GIB}\n")
    monkeypatch.setattr(node, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB, total=64 * GIB))

    assert node.free_bytes(node.cpu()) == 5 * GIB


def test_a_gpu_of_an_old_generation_has_no_bfloat16(three_gpus: None) -> None:
    assert [device.has_bfloat16 for device in node.find_devices()] == [False, True, True]


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 vaes\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 amx_bf16\n", True),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", False),
    ],
)
def test_a_cpu_has_bfloat16_by_its_flags(text: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "CPUINFO", tmp_path / "cpuinfo")
    node.CPUINFO.write_text(text)

    assert node.cpu().as_json()["has_bfloat16"] is has

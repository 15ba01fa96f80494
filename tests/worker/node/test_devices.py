"""Devices of a worker: GPUs by number, and memory that is really free."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from worker.node import cgroup
from worker.node import devices as node

GIB = 2**30


class DriverError(Exception):
    """Replaces NVML's own error."""

    value = 999


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate NVML on a machine with three GPUs."""

    def memory_info(_: int, version: int | None = None) -> Any:
        info = {"total": 80 * GIB, "free": 79 * GIB}
        return SimpleNamespace(**info) if version is None else SimpleNamespace(**info, reserved=GIB)

    def mig_mode(_: int) -> tuple[int, int]:
        raise DriverError("Not Supported")

    nvml = SimpleNamespace(
        NVMLError=DriverError,
        NVML_DEVICE_MIG_ENABLE=1,
        nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetUUID=lambda index: f"GPU-{index}",  # pyright: ignore[reportUnknownLambdaType]
        nvmlMemory_v2=2,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,  # pyright: ignore[reportUnknownLambdaType]
        nvmlDeviceGetName=lambda index: f"GPU {index}",  # pyright: ignore[reportUnknownLambdaType]
        nvmlDeviceGetMemoryInfo=memory_info,
        nvmlDeviceGetCudaComputeCapability=lambda index: (7 + index, 5),  # pyright: ignore[reportUnknownLambdaType]
    )
    monkeypatch.setattr(node, "open_nvml", lambda: nvml)


@pytest.mark.usefixtures("three_gpus")
def test_a_trainer_sees_its_gpu_as_cuda_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    chosen = node.choose_device("2")

    assert (chosen.indices, chosen.torch_name(), chosen.num_processes) == ((2,), "cuda:0", 1)


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize("fault", ["lost", "partitioned"])
def test_a_gpu_that_can_not_be_used_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = node.open_nvml()

    def handle(index: int) -> int:
        if fault == "lost" and index == 1:
            raise DriverError("GPU is lost")
        return index

    def mig_mode(index: int) -> tuple[int, int]:
        if fault != "partitioned":
            raise DriverError("Not Supported")
        return int(index == 1), 0

    nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetMigMode = handle, mig_mode

    assert [device.indices[0] for device in node.find_devices()] == [0, 2]
    assert caplog.messages[0].startswith("GPU 1 can't be used: ")
    assert node.choose_device("2,0").uuids == ("GPU-2", "GPU-0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(SystemExit, match=r"No GPU of this machine can be used \(GPU 1: .*LORRY_DEVICE=cpu"):
        node.find_devices()


def test_gpus_whose_driver_fails_are_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container without GPUs shows the driver of its host, but lacks NVML's library."""

    def fails() -> None:
        raise DriverError("Driver/library version mismatch")

    names = {"NVMLError": DriverError, "NVML_ERROR_LIBRARY_NOT_FOUND": 12, "nvmlInit": fails}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**names))
    monkeypatch.setattr(node, "DRIVER", tmp_path)
    with pytest.raises(SystemExit, match="does not answer: Driver/library version mismatch"):
        node.find_devices()

    monkeypatch.setattr(DriverError, "value", 12)
    assert [device.kind for device in node.find_devices()] == ["cpu"]
    monkeypatch.setattr(node, "DRIVER", tmp_path / "missing")
    monkeypatch.setattr(DriverError, "value", 999)
    assert [device.kind for device in node.find_devices()] == ["cpu"]


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(("visible", "found"), [("2,0", [2, 0]), ("1,7,0", [1]), ("-1", []), ("", []), ("0,-1,2", [0])])
def test_only_visible_gpus_are_found(monkeypatch: pytest.MonkeyPatch, visible: str, found: list[int]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    devices = node.find_devices()

    assert [device.indices[0] for device in devices if device.kind == "cuda"] == found


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize("name", ["GPU-8f2a", "MIG-5c1b"])
def test_a_visible_gpu_that_is_not_a_number_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"0,{name}")

    with pytest.raises(SystemExit, match=name):
        node.choose_device(None)


@pytest.mark.usefixtures("three_gpus")
def test_memory_that_the_driver_reserves_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml, usual = node.open_nvml(), node.open_nvml().nvmlDeviceGetMemoryInfo

    def old(handle: int, version: int | None = None) -> Any:
        if version is not None:
            raise DriverError
        return usual(handle)

    with_reserve = node.choose_device("0")
    nvml.nvmlDeviceGetMemoryInfo = old
    by_an_old_driver = node.choose_device("0")

    assert (with_reserve.memory_bytes, by_an_old_driver.memory_bytes) == (79 * GIB, 80 * GIB)
    assert node.free_bytes(with_reserve) == with_reserve.memory_bytes


@pytest.mark.usefixtures("three_gpus")
def test_a_gpu_without_a_driver_report_has_no_free_memory_and_one_log_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device, nvml = node.choose_device("1"), node.open_nvml()

    def lost(_: int) -> Any:
        raise DriverError("GPU is lost")

    nvml.nvmlDeviceGetMemoryInfo = lost

    assert [node.free_bytes(device) for _ in range(3)] == [0, 0, 0]
    monkeypatch.setattr(node, "open_nvml", lambda: None)
    assert node.free_bytes(device) == 0
    assert [record.args for record in caplog.records] == [(1, "GPU is lost"), (1, "NVML can't be opened")]


@pytest.mark.usefixtures("three_gpus")
def test_a_group_has_the_memory_of_its_smallest_gpu_times_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    alone = [node.choose_device(name) for name in ("0", "1", "2")]

    group = node.choose_device("2,1")

    assert (group.indices, group.memory_bytes) == ((2, 1), 2 * min(alone[1].memory_bytes, alone[2].memory_bytes))
    assert (group.has_bfloat16, node.choose_device("0,1").has_bfloat16) == (True, False)
    assert group.name == "GPU 2, GPU 1"


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(("limit", "of_each"), [(None, 100 * GIB), (90 * GIB, 30 * GIB)])
def test_each_gpu_has_an_equal_part_of_the_host_memory(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, of_each: int
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=300 * GIB))
    monkeypatch.setattr(cgroup, "limit_bytes", lambda: limit)

    assert node.choose_device("2").host_memory_bytes == of_each
    assert node.choose_device("0,1").host_memory_bytes == 2 * of_each


@pytest.mark.usefixtures("three_gpus")
def test_each_gpu_of_a_group_has_a_process_with_the_memory_of_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    group = node.choose_device("2,0")

    assert group.num_processes == 2
    assert group.bytes_of_each == group.memory_bytes // 2
    assert node.free_bytes(group) == min(node.free_bytes(node.choose_device(name)) for name in ("2", "0"))


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("0,3", "This machine has no GPU 3 (available: 0, 1, 2)"),
        ("1,1", "'1,1' lists a GPU twice"),
        ("first", "'first' is not a device group"),
        ("0;1", "'0;1' is not a device group"),
        ("", "'' is not a device group"),
        ("cpu:9999", "This machine has no core 9999"),
        ("cpu:", "'cpu:' is not a device group"),
        ("cpu:1-0", "'cpu:1-0' is not a device group"),
    ],
)
def test_an_invalid_group_is_rejected_with_a_message(
    monkeypatch: pytest.MonkeyPatch, wanted: str, message: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(node, "_own_cores", lambda: {0, 1, 2, 3})

    with pytest.raises(SystemExit) as refused:
        node.choose_device(wanted)

    assert str(refused.value).startswith(message)


def test_cores_are_only_reserved_where_the_system_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_setaffinity")

    with pytest.raises(SystemExit, match=r"^'cpu:0' reserves CPU cores, which needs Linux\. Use cpu\.$"):
        node.choose_device("cpu:0")


def test_a_group_of_cores_has_its_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_own_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=60 * GIB, total=64 * GIB))

    half, some = node.choose_device("cpu:0-1"), node.choose_device("cpu:3,0-1")

    assert (half.kind, half.cores, half.memory_bytes, half.name) == ("cpu", (0, 1), 32 * GIB, "CPU, cores 0, 1")
    assert some.cores == (3, 0, 1)
    assert node.free_bytes(half) <= 32 * GIB


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
def test_bfloat16_support_of_a_cpu_is_read_from_its_flags(
    text: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "CPUINFO", tmp_path / "cpuinfo")
    node.CPUINFO.write_text(text)

    assert node.cpu().as_json()["has_bfloat16"] is has

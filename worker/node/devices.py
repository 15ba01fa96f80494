"""Finds the devices of this machine and their free memory: NVML for GPUs, the operating system for the rest. No torch.

This module also parses the text that selects the device group of a worker.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from worker.node import cgroup

log = logging.getLogger(__name__)
CORES = "cpu:"
NUMBERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""The kernel's names of the feature on x86 and ARM."""
BFLOAT16_CAPABILITY = 8
"""The first compute capability of NVIDIA GPUs (Ampere) that multiplies bfloat16 in hardware."""
UVM_NODE = Path("/dev/nvidia-uvm")
DRIVER = Path("/proc/driver/nvidia/version")
"""Exists while the kernel has the driver of NVIDIA GPUs loaded."""
MODPROBE_SECONDS = 30.0
REPAIR = "Repair it (nvidia-smi shows its state), or train on the CPU: set LORRY_DEVICE=cpu, or pass --groups cpu."
LEAST_BYTES = 64 * 2**10
"""Free disk space below which a trainer can't even write a message."""


class UnresponsiveGpu(Exception):
    """The driver does not answer, or can't report about a GPU. The error's text is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """The device group on which one worker trains: one GPU, several GPUs, the CPU, or some of its cores."""

    kind: str
    """cpu or cuda."""
    indices: tuple[int, ...] = ()
    """The numbers of its GPUs in NVML, which are in PCI bus order. () for a CPU. Usually it has one GPU."""
    uuids: tuple[str, ...] = ()
    """The UUIDs of its GPUs. Unlike numbers, they still name the same GPUs after another GPU was lost."""
    cores: tuple[int, ...] = ()
    """The numbers of the CPU cores that are reserved for it. () if it has all cores that its process may use."""
    name: str
    memory_bytes: int
    """For several GPUs, the memory of the smallest one times their number: all hold the same amount, so the smallest is
    full first. For some cores, a proportional part of the machine's memory."""
    has_bfloat16: bool = True
    """Whether its hardware multiplies bfloat16. Without it, bfloat16 is correct but slower than float32."""
    quantizations: tuple[str, ...] = ()
    """The quantizations in which a trainer on it can hold a base model's linear layers."""
    host_memory_bytes: int = 0
    """For GPUs, a part of the machine's memory that is proportional to their number."""

    @property
    def num_processes(self) -> int:
        """The number of processes of a trainer on it: one for each GPU."""
        return max(1, len(self.indices))

    @property
    def bytes_of_each(self) -> int:
        """The memory of each process of a trainer, in which a replicated base model must fit: that of the smallest GPU,
        or all of a CPU's."""
        return self.memory_bytes // self.num_processes

    @property
    def recomputes(self) -> bool:
        """Whether an engine on it uses activation checkpointing if memory is short."""
        return self.kind == "cuda"

    def torch_name(self) -> str:
        """Return its name within the trainer, which sees no GPUs of other workers."""
        return "cpu" if self.kind == "cpu" else "cuda:0"

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON, for the worker's row in the database."""
        return asdict(self)


def find_devices() -> list[Device]:
    """Return the GPUs that NVML reports, or the CPU if there are none. Raises SystemExit if there are GPUs, but none
    can be used."""
    return _find_gpus() or [cpu()]


def choose_device(wanted: str | None) -> Device:
    """Return the device group that `wanted` names: "cpu", cores such as "cpu:0-3,8", or GPU numbers such as "2" or
    "0,1". The default is the first GPU, or the CPU if there is no GPU. Raises SystemExit if there is no such group."""
    if wanted == "cpu":
        return cpu()
    if wanted is not None and wanted.startswith(CORES):
        if not hasattr(os, "sched_setaffinity"):
            raise SystemExit(f"{wanted!r} reserves CPU cores, which needs Linux. Use cpu.")
        return cpu(cores=_numbers(wanted.removeprefix(CORES), wanted, _own_cores(), "core"))
    found = find_devices()
    if wanted is None or wanted == "auto":
        return found[0]
    gpus = {device.indices[0]: device for device in found if device.kind == "cuda"}
    return _combined([gpus[index] for index in _numbers(wanted, wanted, gpus, "GPU")])


def pin_to(device: Device) -> None:
    """Pin this process and its child processes to the cores of its device. Call it before starting threads."""
    if device.cores:
        os.sched_setaffinity(0, device.cores)


@cache
def create_uvm_node() -> None:
    """Create the device node of CUDA's unified memory if it is missing and the driver's program for it is installed.

    CUDA would start this setuid program itself, but a trainer's sandbox prevents that (no_new_privs).
    """
    program = shutil.which("nvidia-modprobe")
    if UVM_NODE.exists() or program is None:
        return
    try:
        arguments = [program, "-u", "-c", "0"]
        subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=MODPROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s does not exist, and could not be created: %s. Run nvidia-modprobe as root.", UVM_NODE, error)
    else:
        log.info("nvidia-modprobe was run, because %s did not exist.", UVM_NODE)


def _combined(gpus: Sequence[Device]) -> Device:
    if len(gpus) == 1:
        return gpus[0]
    names = list(dict.fromkeys(gpu.name for gpu in gpus))
    return Device(
        kind="cuda",
        indices=tuple(gpu.indices[0] for gpu in gpus),
        uuids=tuple(gpu.uuids[0] for gpu in gpus),
        name=f"{len(gpus)} x {names[0]}" if len(names) == 1 else ", ".join(gpu.name for gpu in gpus),
        memory_bytes=min(gpu.memory_bytes for gpu in gpus) * len(gpus),
        has_bfloat16=all(gpu.has_bfloat16 for gpu in gpus),
        quantizations=gpus[0].quantizations,
        host_memory_bytes=sum(gpu.host_memory_bytes for gpu in gpus),
    )


def _numbers(text: str, wanted: str, found: Collection[int], what: str) -> tuple[int, ...]:
    """Return the numbers in a text such as "0,1" or "0-3,8", in its order. Raises SystemExit if a number is repeated or
    is not in `found`."""
    numbers: list[int] = []
    for part in text.split(","):
        span = NUMBERS.fullmatch(part.strip())
        if span is None:
            raise SystemExit(f"{wanted!r} is not a device group. Use cpu, cpu:0-3, or GPU numbers such as 2 or 0,1.")
        numbers += range(int(span[1]), int(span[2] or span[1]) + 1)
    if not numbers:
        raise SystemExit(f"{wanted!r} is not a device group: a range ends before it begins.")
    missing = [number for number in numbers if number not in found]
    if missing:
        names = _listed(sorted(found)) or "none"
        hint = "Use these, or cpu." if found else "Use cpu."
        raise SystemExit(f"This machine has no {what} {_listed(missing)} (available: {names}). {hint}")
    if len(set(numbers)) < len(numbers):
        raise SystemExit(f"{wanted!r} lists a {what} twice. List each one once.")
    return tuple(numbers)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def quantizations() -> tuple[str, ...]:
    """Return the quantizations of bitsandbytes, which work on any device. () if it isn't installed. Doesn't import
    it."""
    return ("nf4", "int8") if find_spec("bitsandbytes") else ()


def cpu(*, cores: tuple[int, ...] = ()) -> Device:
    """Return the CPU as a device. cores: the cores that are reserved for it; () for all."""
    share = len(cores) / max(1, len(_own_cores())) if cores else 1.0
    return Device(
        kind="cpu",
        cores=cores,
        name=f"CPU, cores {_listed(cores)}" if cores else f"CPU, {num_cores()} cores",
        memory_bytes=int(psutil.virtual_memory().total * share),
        has_bfloat16=_cpu_has_bfloat16(),
        quantizations=quantizations(),
    )


def _cpu_has_bfloat16() -> bool:
    """Return whether the flags of the first core include bfloat16. True if the system doesn't list them."""
    flags = cpu_flags()
    return flags is None or not BFLOAT16_FLAGS.isdisjoint(flags)


def cpu_flags() -> frozenset[str] | None:
    """Return the features of the first core, as the kernel names them. None if the system doesn't list them (macOS)."""
    listed = _cpuinfo("flags|Features")
    return None if listed is None else frozenset(listed.split())


def processor() -> str:
    """Return the model name of the CPU: the first one that the kernel lists, else the name of the architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(names: str) -> str | None:
    """Return the first value that the kernel lists under one of the names, which `|` separates."""
    try:
        found = re.search(rf"^(?:{names})\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(_own_cores())


def _own_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def num_threads() -> int:
    """Return the number of threads for a trainer: OMP_NUM_THREADS if it is set, else one thread per core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else num_cores()


def free_bytes(device: Device) -> int:
    """Return the memory that a trainer on `device` may still allocate.

    For GPUs, it is the free memory of the GPU that has the least. For a CPU, it is the free memory of the machine and
    its cgroup. Reserved cores get at most their part of it.
    """
    if device.kind == "cuda":
        return min(map(_gpu_free_bytes, device.indices))
    available = free_host_bytes()
    return min(available, device.memory_bytes) if device.cores else available


def free_host_bytes() -> int:
    """Return the free memory of this machine and this process's cgroup."""
    available, of_group = psutil.virtual_memory().available, cgroup.free_bytes()
    return available if of_group is None else min(available, of_group)


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect results, without importing them."""
    names = ("lorry", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numba")
    optional = ("bitsandbytes",) if find_spec("bitsandbytes") else ()
    return {name: _version(name) for name in (*names, *optional)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _find_gpus() -> list[Device]:
    try:
        nvml = open_nvml()
    except UnresponsiveGpu as error:
        raise SystemExit(f"The driver of the NVIDIA GPUs does not answer: {error}. {REPAIR}") from error
    if nvml is None:
        return []
    found: list[Device] = []
    problems: list[str] = []
    count = nvml.nvmlDeviceGetCount()
    for index in _visible(count):
        try:
            found.append(_gpu(nvml, index, count))
        except (nvml.NVMLError, UnresponsiveGpu) as error:
            problems.append(f"GPU {index}: {error}")
            log.error("GPU %d can't be used: %s", index, error)
    if problems and not found:
        raise SystemExit(f"No GPU of this machine can be used ({'; '.join(problems)}). {REPAIR}")
    return found


def _gpu(nvml: Any, index: int, count: int) -> Device:
    """Describe one of `count` GPUs. Raises NVMLError and UnresponsiveGpu."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    if _is_partitioned(nvml, handle):
        raise UnresponsiveGpu("it is partitioned by MIG, which Lorry does not support (nvidia-smi -mig 0)")
    generation, _ = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        kind="cuda",
        indices=(index,),
        uuids=(str(nvml.nvmlDeviceGetUUID(handle)),),
        name=str(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=_usable_bytes(nvml, handle),
        has_bfloat16=generation >= BFLOAT16_CAPABILITY,
        quantizations=quantizations(),
        host_memory_bytes=_host_memory_bytes() // count,
    )


def _is_partitioned(nvml: Any, handle: Any) -> bool:
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # a GPU without MIG
        return False
    return mode == nvml.NVML_DEVICE_MIG_ENABLE


def _host_memory_bytes() -> int:
    """Return the machine's memory, or the limit of the cgroup if that is lower."""
    total, limit = int(psutil.virtual_memory().total), cgroup.limit_bytes()
    return total if limit is None else min(total, limit)


def _usable_bytes(nvml: Any, handle: Any) -> int:
    """Return a GPU's memory without the part that its driver reserves, which is never available to jobs."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (AttributeError, nvml.NVMLError):  # a binding or a driver that does not report it
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return int(memory.total) - int(memory.reserved)


def _visible(count: int) -> list[int]:
    """Return the numbers of the GPUs in CUDA_VISIBLE_DEVICES. As in CUDA, the first invalid number ends the list."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(count))
    names = [part.strip() for part in visible.split(",")]
    for name in names:
        if name.startswith(("GPU-", "MIG-")):
            raise SystemExit(
                f"CUDA_VISIBLE_DEVICES contains {name!r}, but a worker accepts GPU numbers only. "
                "Use the numbers that nvidia-smi shows, or unset the variable and set LORRY_DEVICE."
            )
    shown = itertools.takewhile(lambda name: name.isdecimal() and int(name) < count, names)
    return [int(name) for name in shown]


def silence(device: Device) -> str | None:
    """Return the GPU whose free memory the driver does not report now, and the reason. None if it reports all."""
    for index in device.indices:
        try:
            _reported_free_bytes(index)
        except UnresponsiveGpu as error:
            return f"GPU {index} ({error})"
    return None


def _gpu_free_bytes(index: int) -> int:
    """Return a GPU's free memory. 0 if the driver does not report it now: no job is admitted, and running jobs
    continue."""
    try:
        return _reported_free_bytes(index)
    except UnresponsiveGpu as error:
        _log_once(index, str(error))
        return 0


def _reported_free_bytes(index: int) -> int:
    """Return the free memory that NVML reports. Raises UnresponsiveGpu."""
    nvml = open_nvml()
    if nvml is None:
        raise UnresponsiveGpu("NVML can't be opened")
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).free)
    except nvml.NVMLError as error:
        raise UnresponsiveGpu(str(error)) from error


@cache
def _log_once(index: int, reason: str) -> None:
    log.error("The driver does not report the free memory of GPU %d, so no job is admitted: %s", index, reason)


def open_nvml() -> Any:
    """Return NVML, initialized. None if the binding or the driver is missing. Raises UnresponsiveGpu if the driver is
    loaded, but does not answer, for example because its libraries have another version."""
    try:
        import pynvml  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return None
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if DRIVER.exists() and error.value != nvml.NVML_ERROR_LIBRARY_NOT_FOUND:  # as in a container without GPUs
            raise UnresponsiveGpu(str(error)) from error
        return None
    return nvml


def is_disk_full(folder: Path) -> bool:
    """Return whether the disk has too little space for a message of a trainer."""
    try:
        return shutil.disk_usage(folder).free < LEAST_BYTES
    except OSError:
        return False

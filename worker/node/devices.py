"""What this machine has and what is free of it: NVML for GPUs, the operating system for the rest. No torch.

Which device group a worker gets is chosen here too, by the text that names it; several at once are in groups.
"""

from __future__ import annotations

import itertools
import logging
import os
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
"""What the kernel calls it on x86 and on ARM."""
BFLOAT16_CAPABILITY = 8
"""The first generation of NVIDIA's GPUs (Ampere) that multiplies it in hardware."""
UVM_NODE = Path("/dev/nvidia-uvm")
MODPROBE_SECONDS = 30.0
LEAST_BYTES = 64 * 2**10
"""Of a disk, below which a trainer can't even say what it wants to."""


class SilentGpu(Exception):
    """The driver does not tell what is free of a GPU, for the reason that is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What one worker trains on, a device group: one GPU, several, the CPU, or some of its cores."""

    kind: str
    """cpu or cuda."""
    indices: tuple[int, ...] = ()
    """NVML's numbers of its GPUs, which are those of the bus; () of a CPU. One is the usual case."""
    cores: tuple[int, ...] = ()
    """Numbers of the CPU's cores that are its own; () where it has all that its process may use."""
    name: str
    memory_bytes: int
    """Of several GPUs that of the smallest, times their number: all hold the same, so the smallest is full first. Of
    some cores their part of the machine's."""
    has_bfloat16: bool = True
    """Its hardware multiplies bfloat16; without, it is right but slower than float32."""
    quantizations: tuple[str, ...] = ()
    """Beside none: how a trainer on it can hold a base's linears."""
    host_memory_bytes: int = 0
    """Of GPUs: their part of the machine's memory, by number."""

    @property
    def num_processes(self) -> int:
        """Of a trainer on it: one for each GPU."""
        return max(1, len(self.indices))

    @property
    def bytes_of_each(self) -> int:
        """Memory that each process of a trainer has, and holds a whole base in: of the smallest GPU, or all of a
        CPU's."""
        return self.memory_bytes // self.num_processes

    @property
    def recomputes(self) -> bool:
        """Whether an engine on it computes blocks again where memory is short."""
        return self.kind == "cuda"

    def torch_name(self) -> str:
        """Its name within the trainer, to which the launcher shows no GPU of others."""
        return "cpu" if self.kind == "cpu" else "cuda:0"

    def as_json(self) -> dict[str, Any]:
        """For its worker's record."""
        return asdict(self)


def find_devices() -> list[Device]:
    """The GPUs that NVML reports; where there is none, the CPU."""
    return _find_gpus() or [cpu()]


def choose_device(wanted: str | None) -> Device:
    """The device group that `wanted` names: "cpu", cores such as "cpu:0-3,8", GPUs by number such as "2" or "0,1", or
    the first GPU that there is, else the CPU. Ends the program where there is none such."""
    if wanted == "cpu":
        return cpu()
    if wanted is not None and wanted.startswith(CORES):
        return cpu(cores=_numbers(wanted.removeprefix(CORES), wanted, _own_cores(), "core"))
    found = find_devices()
    if wanted is None or wanted == "auto":
        return found[0]
    gpus = {device.indices[0]: device for device in found if device.kind == "cuda"}
    return _together([gpus[index] for index in _numbers(wanted, wanted, gpus, "GPU")])


def settle_on(device: Device) -> None:
    """Keep this process, and what it starts, to the cores of its device. Before it starts threads."""
    if device.cores:
        os.sched_setaffinity(0, device.cores)


@cache
def create_uvm_node() -> None:
    """Create the device node of CUDA's memory, where it is missing and the driver's program for that is installed.

    CUDA would start this setuid program itself, which a trainer's sandbox prevents (no_new_privs).
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


def _together(gpus: Sequence[Device]) -> Device:
    if len(gpus) == 1:
        return gpus[0]
    names = list(dict.fromkeys(gpu.name for gpu in gpus))
    return Device(
        kind="cuda",
        indices=tuple(gpu.indices[0] for gpu in gpus),
        name=f"{len(gpus)} x {names[0]}" if len(names) == 1 else ", ".join(gpu.name for gpu in gpus),
        memory_bytes=min(gpu.memory_bytes for gpu in gpus) * len(gpus),
        has_bfloat16=all(gpu.has_bfloat16 for gpu in gpus),
        quantizations=gpus[0].quantizations,
        host_memory_bytes=sum(gpu.host_memory_bytes for gpu in gpus),
    )


def _numbers(text: str, wanted: str, found: Collection[int], what: str) -> tuple[int, ...]:
    """ "0,1" or "0-3,8", each once and each there; in the order given. Ends the program else."""
    numbers: list[int] = []
    for part in text.split(","):
        span = NUMBERS.fullmatch(part.strip())
        if span is None:
            raise SystemExit(f"{wanted!r} names no device group. Say cpu, cpu:0-3, or GPUs by number such as 2 or 0,1.")
        numbers += range(int(span[1]), int(span[2] or span[1]) + 1)
    if not numbers:
        raise SystemExit(f"{wanted!r} names no device group: its last number comes before its first.")
    missing = [number for number in numbers if number not in found]
    if missing:
        names = _listed(sorted(found)) or "none"
        raise SystemExit(f"There is no {what} {_listed(missing)} here (found: {names}). Choose of these, or say cpu.")
    if len(set(numbers)) < len(numbers):
        raise SystemExit(f"{wanted!r} names a {what} twice. Name each once.")
    return tuple(numbers)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def quantizations() -> tuple[str, ...]:
    """What bitsandbytes gives, on any device; () where it isn't installed. It is not imported."""
    return ("nf4", "int8") if find_spec("bitsandbytes") else ()


def cpu(*, cores: tuple[int, ...] = ()) -> Device:
    """cores: those that are its own; none named: all."""
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
    """By the flags of the first core; taken as True where the system does not tell (macOS)."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return True
    return found is None or not BFLOAT16_FLAGS.isdisjoint(found[1].split())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(_own_cores())


def _own_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def num_threads() -> int:
    """Threads for a trainer: OMP_NUM_THREADS where somebody has set it, else a thread per core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else num_cores()


def free_bytes(device: Device) -> int:
    """Memory that a trainer on `device` may still take: of each of its GPUs, by the one that has the least; or of the
    machine and its cgroup, where some cores alone may take no more than their part."""
    if device.kind == "cuda":
        return min(map(_gpu_free_bytes, device.indices))
    available = psutil.virtual_memory().available
    if device.cores:
        available = min(available, device.memory_bytes)
    of_group = cgroup.free_bytes()
    return available if of_group is None else min(available, of_group)


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result, without importing any."""
    names = ("lorry", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
    optional = ("bitsandbytes",) if find_spec("bitsandbytes") else ()
    return {name: _version(name) for name in (*names, *optional)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _find_gpus() -> list[Device]:
    nvml = open_nvml()
    if nvml is None:
        return []
    found: list[Device] = []
    count = nvml.nvmlDeviceGetCount()
    for index in _visible(count):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = _usable_bytes(nvml, handle)
        generation, _ = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        device = Device(
            kind="cuda",
            indices=(index,),
            name=str(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=memory,
            has_bfloat16=generation >= BFLOAT16_CAPABILITY,
            quantizations=quantizations(),
            host_memory_bytes=_host_memory_bytes() // count,
        )
        found.append(device)
    return found


def _host_memory_bytes() -> int:
    """All of the machine's, or what its cgroup is left of it."""
    total, limit = int(psutil.virtual_memory().total), cgroup.limit_bytes()
    return total if limit is None else min(total, limit)


def _usable_bytes(nvml: Any, handle: Any) -> int:
    """All of a GPU's memory but what its driver keeps for itself, which no job ever has."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (AttributeError, nvml.NVMLError):  # a binding or a driver that does not tell
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return int(memory.total) - int(memory.reserved)


def _visible(count: int) -> list[int]:
    """GPUs that CUDA_VISIBLE_DEVICES leaves, by NVML's numbers. As in CUDA, the first number of none ends the list."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(count))
    names = [part.strip() for part in visible.split(",")]
    for name in names:
        if name.startswith(("GPU-", "MIG-")):
            raise SystemExit(
                f"CUDA_VISIBLE_DEVICES names {name!r}; a worker takes GPUs by their numbers alone. "
                "Give the numbers that nvidia-smi shows, or leave the variable unset and set LORRY_DEVICE."
            )
    shown = itertools.takewhile(lambda name: name.isdecimal() and int(name) < count, names)
    return [int(name) for name in shown]


def silence(device: Device) -> str | None:
    """Of which of its GPUs the driver does not tell now what is free, and why. None: it tells of all."""
    for index in device.indices:
        try:
            _told_free_bytes(index)
        except SilentGpu as silent:
            return f"GPU {index} ({silent})"
    return None


def _gpu_free_bytes(index: int) -> int:
    """0 where the driver does not tell now: nothing more is taken in, and what trains there goes on."""
    try:
        return _told_free_bytes(index)
    except SilentGpu as silent:
        _tell_once(index, str(silent))
        return 0


def _told_free_bytes(index: int) -> int:
    """Raises SilentGpu."""
    nvml = open_nvml()
    if nvml is None:
        raise SilentGpu("NVML can't be opened")
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).free)
    except nvml.NVMLError as error:
        raise SilentGpu(str(error)) from error


@cache
def _tell_once(index: int, why: str) -> None:
    log.error("GPU %d does not tell what is free of it, so no job is taken in: %s", index, why)


def open_nvml() -> Any:
    """NVML, initialized; None where the binding or the driver is missing."""
    try:
        import pynvml  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return None
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def is_disk_full(folder: Path) -> bool:
    """Whether there is no room for a message of a trainer's."""
    try:
        return shutil.disk_usage(folder).free < LEAST_BYTES
    except OSError:
        return False

"""What this machine has and what is free of it: NVML for GPUs, the operating system for the rest. No torch."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What the kernel calls it on x86 and on ARM."""
BFLOAT16_CAPABILITY = 8
"""The first generation of NVIDIA's GPUs (Ampere) that multiplies it in hardware."""
CGROUP_EVENTS = (CGROUP / "memory.events", CGROUP / "memory" / "memory.oom_control")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU, or the CPU."""

    kind: str
    """cpu or cuda."""
    index: int
    """NVML's number, which is that of the bus."""
    name: str
    memory_bytes: int
    has_bfloat16: bool = True
    """Its hardware multiplies bfloat16; without, it is right but slower than float32."""
    quantisations: tuple[str, ...] = ()
    """Beside none: how a trainer on it can hold a base's linears."""

    @property
    def recomputes(self) -> bool:
        """Whether an engine on it computes blocks again where memory is short."""
        return self.kind == "cuda"

    def torch_name(self) -> str:
        """Its name within the trainer, to which the launcher shows no other GPU."""
        return "cpu" if self.kind == "cpu" else "cuda:0"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_devices() -> list[Device]:
    """The GPUs that NVML reports; where there is none, the CPU."""
    return _find_gpus() or [cpu()]


def choose_device(wanted: str | None) -> Device:
    """The device that `wanted` names: "cpu", a GPU's number, or the first that there is. Ends the program else."""
    if wanted == "cpu":
        return cpu()
    found = find_devices()
    if wanted is None or wanted == "auto":
        return found[0]
    chosen = [device for device in found if device.kind == "cuda" and str(device.index) == wanted]
    if not chosen:
        names = ", ".join(str(device.index) for device in found if device.kind == "cuda") or "none"
        raise SystemExit(f"There is no GPU {wanted!r} here (found: {names}). Choose one of these, or cpu.")
    return chosen[0]


def quantisations() -> tuple[str, ...]:
    """What bitsandbytes gives, on any device; () where it isn't installed. It is not imported."""
    return ("nf4", "int8") if find_spec("bitsandbytes") else ()


def cpu() -> Device:
    return Device(
        kind="cpu",
        index=0,
        name=f"CPU, {num_cores()} cores",
        memory_bytes=psutil.virtual_memory().total,
        has_bfloat16=_cpu_has_bfloat16(),
        quantisations=quantisations(),
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
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """Threads for a trainer: OMP_NUM_THREADS where somebody has set it, else a thread per core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else num_cores()


def free_bytes(device: Device) -> int:
    """Memory that a trainer on `device` may still take: of the GPU, or of the machine and its cgroup."""
    if device.kind == "cuda":
        return _gpu_free_bytes(device.index)
    available = psutil.virtual_memory().available
    limit = _read_number(CGROUP / "memory.max")
    if limit is None:
        return available
    used = (_read_number(CGROUP / "memory.current") or 0) - _reclaimable_bytes()
    return max(0, min(available, limit - used))


def _reclaimable_bytes() -> int:
    """Page cache that the kernel gives back when memory is wanted: it counts as used in a cgroup."""
    try:
        found = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def oom_kills() -> int:
    """How many processes of this cgroup the kernel has killed for want of memory, so far."""
    for path in CGROUP_EVENTS:
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return 0


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
    for index in _visible(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        generation, _ = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        device = Device(
            kind="cuda",
            index=index,
            name=str(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=memory,
            has_bfloat16=generation >= BFLOAT16_CAPABILITY,
            quantisations=quantisations(),
        )
        found.append(device)
    return found


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


def _gpu_free_bytes(index: int) -> int:
    nvml = open_nvml()
    assert nvml is not None, "the device was found by NVML"
    return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).free)


def open_nvml() -> Any:
    """NVML, initialised; None where the binding or the driver is missing."""
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


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None

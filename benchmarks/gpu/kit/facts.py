"""Versions, the device, and the ceilings of everything that is measured later."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.kit.kit import Kit
from benchmarks.results import installed_version
from lora_core.runtime.transfers import upload

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numba", "llvmlite", "numpy", "safetensors")
NVIDIA_FIELDS = "name,driver_version,memory.total,clocks.max.sm,clocks.sm,power.limit,temperature.gpu,mig.mode.current"

DATASHEET_FLOPS = {  # dense bfloat16, by a part of the card's name; the first match counts
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def datasheet_flops(name: str) -> float | None:
    return next((flops for part, flops in DATASHEET_FLOPS.items() if part in name), None)


def facts(kit: Kit) -> None:
    for name in PACKAGES:
        kit.tell(name, installed_version(name) or "missing", "version")
    kit.tell("Python", platform.python_version(), "version")
    kit.tell("processor", f"{platform.machine()}, {os.cpu_count()} cores", "text")
    for parts in (_device, _ceilings, _uploads, _launches):
        with kit.attempt(parts.__name__.strip("_")):
            parts(kit)


def _device(kit: Kit) -> None:
    if not kit.on_gpu:
        kit.tell_missing_gpu("device", "describes a GPU")
        return
    card = torch.cuda.get_device_properties(kit.device)
    kit.tell("GPU", card.name, "text", capability=f"{card.major}.{card.minor}", cuda=str(torch.version.cuda))
    kit.tell("GPU memory", card.total_memory, "bytes", free=torch.cuda.mem_get_info(kit.device)[0])
    kit.tell("multiprocessors", card.multi_processor_count, "count")
    kit.tell("C compiler", shutil.which("cc") or shutil.which("gcc") or "missing", "path")
    if program := shutil.which("nvidia-smi"):
        command = [program, f"--query-gpu={NVIDIA_FIELDS}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        kit.tell("nvidia-smi", (done.stdout or done.stderr).strip(), NVIDIA_FIELDS)


def _ceilings(kit: Kit) -> None:
    size, device = kit.sizes.matrix, kit.device
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    seconds = kit.seconds_each(lambda: torch.matmul(left, right), calls=20)
    kit.matrix_flops = 2 * size**3 / seconds
    kit.tell(f"bfloat16 matmul {size}³", kit.matrix_flops / 1e12, "TFLOP/s")
    source = torch.zeros(kit.sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = kit.seconds_each(lambda: target.copy_(source), calls=5)
    kit.tell("copy on the device, read and written", 2 * kit.sizes.copy_bytes / seconds / 1e9, "GB/s")


def _launches(kit: Kit) -> None:
    add_to_all: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
    one, many = torch.zeros(1, device=kit.device), [torch.zeros(1, device=kit.device) for _ in range(100)]
    kit.tell("add_ on one element", 1e6 * kit.seconds_each(lambda: one.add_(1), calls=1000), "µs")
    kit.tell("_foreach_add_ on 100 elements", 1e6 * kit.seconds_each(lambda: add_to_all(many, 1), calls=100), "µs")
    kit.tell("read of one number by the host", 1e6 * kit.seconds_each(lambda: one.add_(1).item(), calls=100), "µs")
    rows, weights = (torch.randn(4, 64, 64, device=kit.device).to(torch.bfloat16) for _ in range(2))
    kit.tell("bmm of four small matrices", 1e6 * kit.seconds_each(lambda: torch.bmm(rows, weights), calls=1000), "µs")
    if not kit.on_gpu:
        kit.tell_missing_gpu("Triton kernel on one element", "Triton compiles for a GPU")
        return
    from lora_core.kernels.gpu import elementwise

    gate, up, y = (torch.zeros(1, device=kit.device) for _ in range(3))
    seconds = kit.seconds_each(lambda: elementwise.swiglu(gate, up, y), calls=1000)
    kit.tell("Triton kernel on one element", 1e6 * seconds, "µs")


def _uploads(kit: Kit) -> None:
    count = kit.sizes.upload_bytes
    pageable, device = torch.zeros(count, dtype=torch.uint8), kit.device
    small = [np.zeros(4096, np.uint8)]
    kit.tell("upload, pageable memory", count / kit.seconds(lambda: pageable.to(device, copy=True)) / 1e9, "GB/s")
    kit.tell("upload of 4 kB as a tick does", 1e6 * kit.seconds_each(lambda: upload(small, device), calls=100), "µs")
    if not kit.on_gpu:
        kit.tell_missing_gpu("upload, pinned memory", "pinned memory belongs to a driver")
        return
    pinned = pageable.pin_memory()
    seconds = kit.seconds(lambda: pinned.to(device, non_blocking=True))
    kit.tell("upload, pinned memory", count / seconds / 1e9, "GB/s")

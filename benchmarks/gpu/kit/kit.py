"""The state that all stages share: results, sizes, base models that are created once, and clocks."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.kit.log import Log, Value
from benchmarks.gpu.kit.shapes import Shape, build
from benchmarks.gpu.kit.sizes import Sizes
from benchmarks.gpu.kit.supervision import Progress
from lora_core.base_model.model import BaseModel


class StageOver(BaseException):
    """The deadline of a stage has passed. No `except Exception` of the code under test may catch this."""


@dataclass(kw_only=True)
class Kit:
    """`matrix_flops` is the measured matmul rate of the device, once known. `progress` is for a next process."""

    log: Log
    sizes: Sizes
    stage: str = ""
    matrix_flops: float | None = None
    bases: dict[str, BaseModel] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    @property
    def device(self) -> torch.device:
        return torch.device(self.sizes.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def tell(self, name: str, value: Value, unit: str, **details: Any) -> None:
        self.log.record(self.stage, name, value, unit, **details)

    def tell_missing_gpu(self, name: str, reason: str) -> None:
        self.tell(name, "needs CUDA", "text", reason=reason)

    def base(self, shape: Shape) -> BaseModel:
        """Return the base model of a shape with random weights, created on the device at the first call.

        The large one has the memory of the device to itself, since free memory decides whether its ticks recompute.
        """
        if shape == self.sizes.large and self.bases.pop(self.sizes.small.name, None) is not None:
            self.free()
        if shape.name not in self.bases:
            started = time.perf_counter()
            self.bases[shape.name] = build(shape, device=self.sizes.device)
            self.synchronize()
            self.tell(f"creation of the {shape.name} base model", time.perf_counter() - started, "s")
        return self.bases[shape.name]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object], *, repeats: int = 5) -> float:
        """Return the median seconds of a call with an idle device before and after it. The first call is a warm-up."""
        times: list[float] = []
        for _ in range(1 + (repeats if self.on_gpu else 1)):
            self.synchronize()
            started = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return median(times[1:])

    def seconds_each(self, function: Callable[[], object], *, calls: int) -> float:
        """Return the seconds per call of many calls that the device computes one after another."""
        calls = calls if self.on_gpu else 2

        def repeatedly() -> None:
            for _ in range(calls):
                function()

        return self.seconds(repeatedly, repeats=3) / calls

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record the traceback of an exception in the block, and continue after it."""
        is_whole = False
        try:
            yield
            is_whole = True
        except Exception as error:  # noqa: BLE001 - whatever the code under test raises is a result
            self.tell(name, f"failed: {type(error).__name__}", "text", traceback=traceback.format_exc())
        if not is_whole:  # only here does no traceback hold the tensors of the block
            self.free()

    @contextmanager
    def suspecting(self, family: str) -> Iterator[None]:
        """Note that the kernels of `family` run, in case the device fails or blocks. Raises what they did to it."""
        self.progress.suspect = family
        self.progress.write()
        yield
        self.synchronize()
        self.progress.suspect = ""
        self.progress.write()

    def detach(self) -> None:
        """Return every base model to its state without an engine, which an interrupted stage may have left attached."""
        for base in self.bases.values():
            if base.attachment is not None:
                base.attachment.detach()
                base.attachment = None
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

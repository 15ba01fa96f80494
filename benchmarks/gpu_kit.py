"""Check and measure the engine on a CUDA GPU within a time limit: `python -m benchmarks.gpu_kit --out DIR`.

First the tests with the marker `gpu`, then measurements. Each measurement is a process, so that one that crashes or
blocks the GPU ends alone. Each result is in DIR/kit.jsonl at once. The machine needs only torch, Triton, transformers,
PEFT, accelerate, Numba, safetensors, psutil, pytest and pytest-timeout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gate import GPU_VARIABLES, Contender, Json
from benchmarks.results import installed_version
from benchmarks.workload import ROOT, write_tokens

TESTS = "tests/lora_core/engine/test_laws_on_gpu.py"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numba", "numpy")
NO_GPU = """The kit needs a CUDA GPU, but torch finds none here.
Run it on a machine with a GPU and a CUDA build of torch, or use --quick to check at toy sizes on a CPU that it runs.
"""
MAX_SECONDS = 120.0
"""Time limit of one answer of a measurement, which includes the start of its process."""
WARM_STEPS = 2
TEST_RESULT = re.compile(r"(?P<test>\S+::.+?) (?P<outcome>PASSED|FAILED|SKIPPED|ERROR)\b")
CONTENDERS: Mapping[str, tuple[str, Json]] = {
    "Lorry": ("lorry", {}),
    "Lorry, all jobs in one tick": ("lorry", {"tick_tokens": 1 << 20}),
    "Lorry, 1 job": ("lorry", {"jobs": 1}),
    "PEFT in a loop": ("peft_loop", {}),
    "PEFT with Trainer": ("peft_trainer", {}),
}
"""Title, name and options of the contenders. PEFT trains one job; several, one after another, have the same rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a Llama model with random weights. Weight values don't affect speed."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    vocab: int
    tied: bool = False

    @property
    def block_parameters(self) -> int:
        """Weights of the blocks' linear layers, which multiply every token: without embedding and output head."""
        attention = 2 * self.hidden * (self.hidden + self.hidden // self.heads * self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward)

    def write(self, folder: Path) -> Path:
        """Write a base model folder that has only a config.json."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": self.tied,
        }
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        return folder


LARGE_VOCAB = 128_256
FULL = {
    "1B": Shape(hidden=2048, feed_forward=8192, layers=16, heads=32, key_heads=8, vocab=LARGE_VOCAB, tied=True),
    "8B": Shape(hidden=4096, feed_forward=14_336, layers=32, heads=32, key_heads=8, vocab=LARGE_VOCAB),
}
TOY = {"toy": Shape(hidden=64, feed_forward=128, layers=2, heads=4, key_heads=2, vocab=320)}
FULL_OPTIONS: Json = {
    "device": "cuda:0",
    "dtype": "bfloat16",
    "rank": 16,
    "jobs": 16,
    "batch_size": 4,
    "longest_row": 480,
    "tick_tokens": 8192,
    "job_tokens": 8192,
    "slice_tokens": 4096,
    "matrix": 8192,
    "copy_bytes": 1 << 30,
}
"""The tokens are TICK_TOKENS, MOST_JOB_TOKENS and SLICE_TOKENS of catalog/resources/memory.py for CUDA. That module
needs packages that the machine may lack."""
TOY_OPTIONS = FULL_OPTIONS | {
    **{"device": "cpu", "rank": 4, "jobs": 3, "batch_size": 2, "longest_row": 24},
    **{"tick_tokens": 64, "job_tokens": 64, "slice_tokens": 64, "matrix": 64, "copy_bytes": 1 << 16},
}


class Log:
    """Appends each result to FOLDER/kit.jsonl, synchronizes it to disk, and writes all as tables to FOLDER/kit.md."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.has_failed = folder, False
        self._started, self._lines = time.monotonic(), list[Json]()

    def record(self, stage: str, name: str, value: Any, unit: str, **details: Any) -> None:
        line = {"second": time.monotonic() - self._started, "stage": stage, "name": name, "value": value, "unit": unit}
        line = {key: _plain(each) for key, each in (line | details).items()}
        self._lines.append(line)
        with (self.folder / "kit.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def fail(self, stage: str, name: str, why: str) -> None:
        self.has_failed = True
        self.record(stage, name, "failed", "text", why=why)

    def write_page(self) -> None:
        text = ["# GPU kit", ""]
        for stage in dict.fromkeys(line["stage"] for line in self._lines):
            text += [f"## {stage}", "", "| Second | Result | Value | Unit | Details |", "|--:|---|--:|---|---|"]
            text += [_row(line) for line in self._lines if line["stage"] == stage] + [""]
        (self.folder / "kit.md").write_text("\n".join(text), "utf-8")


def _plain(value: Any) -> Any:
    """Return NaN and infinity as text, because JSON has no number for them."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def _row(line: Json) -> str:
    first = ("second", "stage", "name", "value", "unit")
    details = "; ".join(f"{key}: {str(value).strip()[-200:]}" for key, value in line.items() if key not in first)
    cells = (line["second"], line["name"], line["value"], line["unit"], details)
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


class Kit:
    """Runs the stages. `ends` is the end of the time limit, by the monotonic clock."""

    def __init__(self, log: Log, options: Json, shapes: Mapping[str, Shape], *, ends: float, repeats: int) -> None:
        self._log, self._options, self._ends, self._repeats = log, options, ends, repeats
        self._scratch = tempfile.TemporaryDirectory(prefix="lorry-gpu-kit-")
        self._matrix_flops: float | None = None
        self._shapes = shapes
        self._bases = {name: shape.write(Path(self._scratch.name) / name) for name, shape in shapes.items()}
        self.stages = {"correctness": self._correctness, "ceilings": self._ceilings, "compare": self._compare}
        self.stages |= {name: lambda name=name: self._measure_each(name) for name in ("profile", "stalls")}

    def run(self, names: list[str]) -> None:
        for name in names:
            self.stages[name]()
            self._log.write_page()
            print(f"{name}: done", flush=True)
        self._scratch.cleanup()

    def _correctness(self) -> None:
        """Run the tests, at most for half of the time that is left."""
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default"]
        command += ["--confcutdir", "tests/lora_core", TESTS]  # tests/conftest.py needs the packages of the service
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | GPU_VARIABLES | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        timer = threading.Timer((self._ends - time.monotonic()) / 2, process.kill)
        timer.start()
        assert process.stdout is not None
        with (self._log.folder / "tests.txt").open("a", encoding="utf-8", buffering=1) as output:
            for line in process.stdout:
                output.write(line)
                if found := TEST_RESULT.match(line):
                    self._log.record("correctness", found["test"].rpartition("::")[2], found["outcome"], "text")
        timer.cancel()
        if status := process.wait():
            self._log.fail("correctness", "tests", f"pytest exited with status {status}; see tests.txt")

    def _ceilings(self) -> None:
        for name in PACKAGES:
            self._log.record("ceilings", name, installed_version(name) or "missing", "version")
        self._log.record("ceilings", "processor", f"{platform.machine()}, {os.cpu_count()} cores", "text")
        for report in self._reports("ceilings", next(iter(self._shapes)), "ceilings", "ceilings", {}):
            self._matrix_flops = report["flops"]
            self._record_all("ceilings", "", report)

    def _measure_each(self, name: str) -> None:
        for shape in self._shapes:
            for report in self._reports(name, shape, shape, name, {}):
                self._record_all(name, f"{shape}: ", report)

    def _record_all(self, stage: str, prefix: str, report: Json) -> None:
        for result in report["results"]:
            self._log.record(stage, prefix + result.pop("name"), result.pop("value"), result.pop("unit"), **result)

    def _compare(self) -> None:
        """Measure the contenders one after another: each has the device's memory, which decides about recomputation."""
        for shape in self._shapes:
            rates = {title: self._rates(shape, title, *given) for title, given in CONTENDERS.items()}
            medians = {title: median(found) for title, found in rates.items() if found}
            for title, rate in medians.items():
                flops = 4 * self._shapes[shape].block_parameters * rate
                share = {"fraction_of_matmul": flops / self._matrix_flops} if self._matrix_flops else {}
                name = f"{shape}: {title}, median of {len(rates[title])}"
                self._log.record("compare", name, rate, "tokens/s", teraflops=flops / 1e12, **share)
                if title.startswith("Lorry"):
                    for rival in (rival for rival in medians if rival.startswith("PEFT")):
                        self._log.record("compare", f"{shape}: {title} over {rival}", rate / medians[rival], "times")

    def _rates(self, shape: str, title: str, name: str, options: Json) -> list[float]:
        found: list[float] = []
        for number, report in enumerate(self._reports("compare", shape, title, name, options)):
            rate = report["tokens"] / report["seconds"]
            details = {key: report[key] for key in ("loss", "ticks", "recomputed_ticks") if key in report}
            if number >= WARM_STEPS:
                self._log.record("compare", f"{shape}: {title}, step {number}", rate, "tokens/s", **details)
                found.append(rate)
        return found

    def _reports(self, stage: str, shape: str, title: str, name: str, options: Json) -> Iterator[Json]:
        """Yield the answers of a contender. A failure ends them and is recorded."""
        patience = min(MAX_SECONDS, self._ends - time.monotonic())
        if patience <= 0:
            self._log.fail(stage, f"{shape}: {title}", "the time limit had passed")
            return
        tokens = self._tokens(shape)
        given = self._options | {"base": str(self._bases[shape]), "tokens": str(tokens)} | options
        log = self._log.folder / f"{stage}-{shape}-{name}.log"
        with closing(Contender(name, threads=1, log=log, patience_seconds=patience, **given)) as contender:
            try:
                for _ in range(WARM_STEPS + self._repeats if stage == "compare" else 1):
                    yield contender.step()
            except RuntimeError as error:
                self._log.fail(stage, f"{shape}: {title}", str(error))

    def _tokens(self, shape: str) -> Path:
        """Write the rows of one batch, which every step of every job repeats, so that all shapes are warm."""
        numbers, longest = np.random.default_rng(0), self._options["longest_row"]
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for length in numbers.integers(longest // 8, longest + 1, self._options["batch_size"]):
            ids = numbers.integers(0, self._shapes[shape].vocab, length, dtype=np.int32)
            rows.append((ids, (np.arange(length) >= length // 2).astype(np.uint8)))
        return write_tokens(rows, Path(self._scratch.name) / f"{shape}.safetensors")


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    if not options.quick and not has_gpu():
        sys.stderr.write(NO_GPU)
        return 2
    shapes, sizes = (TOY, TOY_OPTIONS) if options.quick else (FULL, FULL_OPTIONS)
    log, repeats = Log(options.out), 1 if options.quick else 5
    kit = Kit(log, sizes, shapes, ends=started + options.seconds, repeats=repeats)
    kit.run([name for name in kit.stages if name in (options.only or kit.stages)])
    return 1 if log.has_failed else 0


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kit", description=__doc__)
    stages = ("correctness", "ceilings", "compare", "profile", "stalls")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; kit.jsonl is appended to")
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit of all stages (default: 480)")
    parser.add_argument("--only", nargs="+", choices=stages, metavar="STAGE", help="stages to run (default: all)")
    parser.add_argument("--quick", action="store_true", help="toy sizes on a CPU: check that every stage runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())

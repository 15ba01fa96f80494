"""An engine in a process with limited memory: `python -m tests.lora_core.limited_memory BASE_DIR` prints the outcomes.

The limit is the kernel's, on this process's address space, so the allocators fail as they do on a full machine.
"""

import hashlib
import json
import resource
import sys
from pathlib import Path

import torch

from lora_core.base_model.model import BaseModel, load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import OutOfMemory
from tests.lora_core.scenarios import Submission, admit, config, dataset, run_alone, state_bytes

HEADROOM_BYTES = 96 * 2**20
"""A slice of 2,048 tokens takes about half of it. Three such slices, or one of 16,384 tokens, exceed it."""
LARGE = Submission(config=config(batch_size=64, num_steps=2, slice_tokens=16_384, seed=9), train=dataset(9, [256] * 64))
MEDIUM = [
    Submission(config=config(batch_size=8, num_steps=2, slice_tokens=2048, seed=seed), train=dataset(seed, [256] * 8))
    for seed in (1, 2, 3, 4)
]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def forbid_growth() -> None:
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(base: BaseModel) -> dict[str, object]:
    alone = [digest(run_alone(base, job).vectors) for job in MEDIUM]
    engine = Engine(base, EngineConfig(token_budget=16_384, max_tick_seconds=1e6))
    admit(engine, "large", LARGE)
    for index, job in enumerate(MEDIUM):
        admit(engine, str(index), job)
    forbid_growth()
    refused: list[str] = []
    largest = [engine._memory.max_tokens]
    while not engine.idle:
        try:
            engine.tick()
        except OutOfMemory as error:
            refused.append(error.job)
            engine.evict(error.job)
        largest.append(engine._memory.max_tokens)
    together = [digest(state_bytes(engine, str(index))) for index in range(len(MEDIUM))]
    return {"refused": refused, "was_bisected": min(largest) < largest[0], "unchanged": together == alone}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(load_base(Path(sys.argv[1]), dtype="float32", device="cpu"))))  # noqa: T201

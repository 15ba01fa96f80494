"""`python -m tests.lora_core.train_in_unlike_ranks BASE OUT`: one of several processes on devices of unlike models.

The devices round alike and add up in other orders: on every rank but the leader, norms and decompositions have other
last bits. Each process writes OUT/RANK.json: the digest of every job, or the error.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.base_model.model import load_base
from lora_core.config import OptimizerConfig
from lora_core.distributed import ranks as distributed
from lora_core.engine import engine as engine_module
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import RanksDiffer
from tests.lora_core.scenarios import Submission, admit, config, dataset, state_bytes

FUNCTIONS = ("vector_norm", "svd", "qr")
OTHER = 1 + 1e-6
"""Factor on the results, more than a bit so that no rounding hides it."""


def started(*, seed: int, **lora: Any) -> Submission:
    plain = config(num_steps=3, seed=seed, slice_tokens=20)
    return Submission(config=replace(plain, lora=replace(plain.lora, **lora)), train=dataset(seed, [14, 9, 22, 31]))


def by_adafactor(*, seed: int, **lora: Any) -> Submission:
    job, optimizer = started(seed=seed, **lora), OptimizerConfig(kind="adafactor", learning_rate=0.3, weight_decay=0.1)
    return replace(job, config=replace(job.config, optimizer=optimizer))


JOBS = {
    "pissa": started(seed=1, init_lora_weights="pissa"),
    "pissa_niter_2": started(seed=2, init_lora_weights="pissa_niter_2"),
    "olora": started(seed=3, init_lora_weights="olora"),
    "dora": started(seed=4, use_dora=True),
    "olora_dora": started(seed=5, init_lora_weights="olora", use_dora=True),
    "adafactor": by_adafactor(seed=6),
    "adafactor_dora": by_adafactor(seed=7, use_dora=True),
}


def main(base_dir: Path, out: Path) -> None:
    torch.set_num_threads(1)
    engine_module.START_WORK = 1  # one linear layer per tick
    ranks = distributed.join("cpu", silence_seconds=60)
    base = load_base(base_dir, dtype="float32", device="cpu", ranks=ranks)
    if not ranks.leads:
        for name in FUNCTIONS:
            setattr(torch.linalg, name, perturbed(getattr(torch.linalg, name)))
    found: dict[str, Any] = {}
    for name, job in JOBS.items():
        engine = Engine(base, EngineConfig(token_budget=120, ticks_alone=0), ranks)
        admit(engine, name, job)
        try:
            if name == "olora":
                engine.compare_ranks(name)  # as before a checkpoint of a job that leaves during its initialization
            while not engine.idle:
                engine.tick()
            engine.compare_ranks(name)
        except RanksDiffer as error:
            found[name] = str(error)
        else:
            found[name] = sha256(state_bytes(engine, name)).hexdigest()
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    distributed.end_process()


def perturbed(function: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return result * OTHER if isinstance(result, Tensor) else tuple(part * OTHER for part in result)

    return changed


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

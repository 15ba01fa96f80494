"""Process of a contender: `python -m benchmarks.contenders NAME OPTIONS`, started by gate.Contender.

All contenders train on the same batches in the same order. Token counts don't include padding. A contender imports only
what it needs, so that Lorry's imports don't count in a script's start time.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

from benchmarks.gate import Gate, Json
from benchmarks.workload import SEED

CONTENDERS = {
    **dict.fromkeys(("lorry", "matrix"), "benchmarks.contenders.engine"),
    **dict.fromkeys(("peft_loop", "peft_trainer", "trl_sft"), "benchmarks.contenders.baselines"),
    **dict.fromkeys(("ceilings", "profile", "stalls"), "benchmarks.contenders.gpu"),
}
"""Module of each contender."""


def main(name: str, options: Json) -> None:
    import torch

    torch.set_num_threads(options["threads"])
    torch.manual_seed(SEED)
    getattr(import_module(CONTENDERS[name]), name)(Gate(options.get("num_steps")), options)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

"""`python -m tests.lora_core.fake_cuda.ticks LIBRARY`: runs ticks on a fake CUDA device.

Reads one request as JSON from standard input for each line, and prints one line of JSON for each. A request names a
function in `run`, and has its arguments.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    from tests.lora_core.fake_cuda.build import load

    load(Path(sys.argv[1]))  # before torch is imported
    os.environ["DS_ACCELERATOR"] = "cuda"  # transformers imports DeepSpeed, which would choose the CPU
    import torch

    from tests.lora_core.fake_cuda import runs, sharding

    torch.set_num_threads(1)
    functions = {
        "tick": runs.measured_tick,
        "initialization": runs.measured_initialization,
        "answers": runs.measured_answers,
        "jobs": runs.run_jobs,
        "sharded jobs": sharding.run_sharded_jobs,
        "snapshots": runs.take_snapshots,
    }
    for line in sys.stdin:
        request = json.loads(line)
        function = functions[request.pop("run")]
        sys.stdout.write(json.dumps(function(**request)) + "\n")
        sys.stdout.flush()

"""`python -m tests.lora_core.fake_cuda.ticks LIBRARY`: runs ticks on a fake CUDA device.

Reads one request as JSON from standard input for each line, and prints one line of JSON for each. A request has the
fields of `Shape` and `Load`, or names the jobs of scenarios.py that run in one pack.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from tests.lora_core.fake_cuda.build import load

    load(Path(sys.argv[1]))  # before torch is imported
    from tests.lora_core.fake_cuda.runs import answer

    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()

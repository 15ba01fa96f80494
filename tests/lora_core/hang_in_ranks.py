"""`python -m tests.lora_core.hang_in_ranks`: the first of two processes waits forever, and the second fails.

The first one waits outside any device operation, so no device error can end its wait.
"""

import os
import threading

from lora_core.distributed import failure_broadcast
from lora_core.distributed import ranks as distributed
from lora_core.distributed.failure_broadcast import broadcast_failures


def main() -> None:
    failure_broadcast.POLL_SECONDS, failure_broadcast.GRACE_SECONDS = 0.05, 0.5
    ranks = distributed.join("cpu", silence_seconds=300)
    with broadcast_failures(ranks):
        if ranks.leads:
            threading.Event().wait()
        raise ValueError("the number 7")


if __name__ == "__main__":
    try:
        main()
    except ValueError:
        os._exit(3)  # like a process that fails: without a shutdown of the process group

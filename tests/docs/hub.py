"""A Hugging Face Hub on loopback with the one base model that the pages use.

`python -m tests.docs.hub FOLDER` serves the model in FOLDER until Ctrl-C, to try a page by hand with another model.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.lora_core.loopback_hub import hub_that_serves

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMIT = "5a33ba103645800d7b3790c4448546c1b73efc71"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve the files of `folder` as MODEL, and yield the value of HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_that_serves(folder, COMMIT, [], repository=MODEL))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serving(Path(sys.argv[1])) as endpoint:
        sys.stdout.write(f"HF_ENDPOINT={endpoint}\n")
        sys.stdout.flush()
        threading.Event().wait()

"""Check and measure the engine on a CUDA GPU within a time limit: `python -m benchmarks.gpu.kit --out DIR`.

Runs on a machine that has only torch, Triton, transformers, PEFT, accelerate, Numba, safetensors and psutil.
Writes DIR/kit.jsonl after each result, and DIR/kit.md after each stage.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.kit.supervision import PROGRESS, Progress, supervise

NO_GPU = """The kit needs a CUDA GPU, but torch finds none here.
Run it on a machine with a GPU and a CUDA build of torch, or use --quick to check at toy sizes on a CPU that it runs.
"""


def main() -> None:
    """Start the process that runs the stages, with the same command, or be that process."""
    started = time.monotonic()
    options = _parser().parse_args()
    if PROGRESS in os.environ:
        work(options, Progress.read(Path(os.environ[PROGRESS])))
    else:
        command = [sys.executable, *sys.orig_argv[1:]]
        raise SystemExit(supervise(command, options.out, started=started, seconds=options.seconds))


def work(options: argparse.Namespace, progress: Progress) -> None:
    """Run the stages of `progress`, or in the first process those of the options."""
    prepare_environment(Path(tempfile.gettempdir()))

    from benchmarks.gpu.kit import run  # imports torch, which reads the environment

    if not options.quick and not run.has_gpu():
        sys.stderr.write(NO_GPU)
        raise SystemExit(2)
    known = list(run.STAGES)
    if unknown := set(options.only or known) - set(known):
        sys.stderr.write(f"Unknown stages: {', '.join(sorted(unknown))}. Known stages: {', '.join(known)}.\n")
        raise SystemExit(2)
    names = [name for name in known if name in (options.only or known)]
    names = names if progress.names is None else progress.names
    run.run_stages(options.out, names, progress=progress, quick=options.quick)


def prepare_environment(scratch: Path) -> None:
    """Set the variables that torch, Triton and the Hub's client read when they are imported."""
    os.environ |= {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "TRITON_CACHE_DIR": str(scratch / "kit-triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "kit-inductor"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kit", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for kit.jsonl and kit.md; new results append")
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit of all stages (default: 480)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages to run (default: all)")
    parser.add_argument("--quick", action="store_true", help="toy sizes on a CPU: check that every stage runs")
    return parser


if __name__ == "__main__":
    main()

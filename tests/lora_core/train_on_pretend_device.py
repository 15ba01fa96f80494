"""`python -m tests.lora_core.train_on_pretend_device FOLDER FAMILY DTYPE TASK`: runs whole jobs on pretend_device.py.

Jobs that differ in everything train in one pack with the GPU kernels that need no Triton, resume after their first
step, answer prompts, and are exported and verified. One job continues another's adapter. Prints a line of JSON for each
verified job.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from lora_core.base_model.model import load_base
from lora_core.base_model.patching import Attachment
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobFinished, JobStepped
from lora_core.forward.generation import Prompts
from lora_core.kernels.selection import Kernels
from lora_core.layers.attention import flash
from lora_core.layers.attention.tiled_cpu import STRIP_NUMBERS
from lora_core.peft_format.verify import verify_export
from tests.lora_core.classifiers import classification_jobs
from tests.lora_core.pretend_device import DEVICE, KIND, pretending
from tests.lora_core.scenarios import Submission, admit, submissions
from tests.lora_core.varlen_stand_in import StandIn

AS_ON_A_GPU = Kernels(attention="varlen")
QUESTION = Prompts(prompts=((3, 4, 5, 6, 7), (9, 10)), max_tokens=3)


def main(folder: Path, family: str, dtype: str, task: str) -> None:
    torch.set_num_threads(1)
    stand_in = StandIn()
    flash.kernel = lambda: stand_in
    STRIP_NUMBERS[KIND] = STRIP_NUMBERS["cuda"]
    jobs = submissions(family) if task == "causal-lm" else classification_jobs(with_types=family == "bert")
    whole = set_checkpoint_early_stop(False)  # it raises an exception, which can't pass the device's guard in Python
    with pretending(), whole, TemporaryDirectory() as scratch:
        base = load_base(folder, dtype=cast(Any, dtype), device=DEVICE, task=cast(Any, task))
        base.attachment = Attachment(base.model, AS_ON_A_GPU)
        blocks = "always" if dtype == "float32" else "never"
        engine = Engine(base, EngineConfig(token_budget=512, checkpoint_blocks=blocks))
        for name, submission in jobs.items():
            admit(engine, name, submission)
        while not engine.idle:
            for event in engine.tick():
                follow(engine, event, jobs, Path(scratch))


def follow(engine: Engine, event: Event, jobs: dict[str, Submission], scratch: Path) -> None:
    checkpoint, exported = scratch / f"{event.job}-1", scratch / event.job
    if isinstance(event, JobStepped) and event.step == 1:
        engine.save_checkpoint(event.job, checkpoint)
        engine.evict(event.job)
        admit(engine, event.job, jobs[event.job], resume_from=checkpoint)
    if not isinstance(event, JobFinished):
        return
    if engine.base.task == "causal-lm":
        generation = engine.generation({event.job: QUESTION})
        while not generation.is_complete:
            generation.advance()
    engine.export(event.job, exported, base_name="base")
    sys.stdout.write(json.dumps({"job": event.job, **asdict(verify_export(engine.base, exported))}) + "\n")
    engine.evict(event.job)
    if event.job == "plain":
        jobs["child"] = replace(jobs["dpo"], parent=exported)
        admit(engine, "child", jobs["child"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

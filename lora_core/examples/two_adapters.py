# pyright: basic
"""Train two adapters of different rank together on one base model, without the service.

`python -m lora_core.examples.two_adapters [--base FOLDER_OR_GGUF] [--out FOLDER]`. The default base model is tiny and
random. An adapter's config names the folder of its base model: the given one, or `base` in the output folder for a GGUF
file and for the random model.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import LoraConfig

from lora_core.base_model.model import load_base
from lora_core.config import JobConfig, OptimizerConfig, ScheduleConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import LoraCoreError
from lora_core.examples.inputs import base_folder, refuse_taken, text_rows
from lora_core.peft_format.config import lora_config_from


def train_two(base_dir: Path, out_dir: Path, *, base_name: str, num_steps: int = 8) -> None:
    adapters = {
        "narrow": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "wide": LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
    }
    engine = Engine(load_base(base_dir, dtype="float32", device="cpu"), EngineConfig())
    for name, adapter in adapters.items():
        config = JobConfig(
            lora=lora_config_from(adapter),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            schedule=ScheduleConfig(kind="constant", num_steps=num_steps),
            batch_size=2,
            num_steps=num_steps,
            seed=0,
        )
        engine.admit(name, config, text_rows(base_dir))
    while not engine.idle:
        for event in engine.tick():
            print(event)  # noqa: T201
    for name in engine.jobs():
        engine.export(name, out_dir / name, base_name=base_name)
        print(f"{name}: {out_dir / name}")  # noqa: T201


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_core.examples.two_adapters", description=__doc__)
    parser.add_argument("--base", type=Path, help="folder of safetensors or a GGUF file (default: a tiny random model)")
    parser.add_argument("--out", type=Path, default=Path("adapters"), help="folder for both adapters; new or empty")
    given = parser.parse_args(arguments)
    out_dir, source = given.out.resolve(), given.base and given.base.resolve()
    try:
        refuse_taken(out_dir)
        with TemporaryDirectory() as scratch:
            is_kept = source is None or source.is_file()
            base_dir = base_folder(source, out_dir if is_kept else Path(scratch))
            train_two(base_dir, out_dir, base_name=str(base_dir if is_kept else source))
    except LoraCoreError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

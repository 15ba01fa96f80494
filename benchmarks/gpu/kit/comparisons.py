"""The engine against PEFT in a loop and PEFT with Trainer: the same batches, warm shapes, in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, cast

import torch

from benchmarks.contenders.baselines import pad
from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.load import LEARNING_RATE, Load
from benchmarks.gpu.kit.profiles import base_name, chosen, tell_rate
from benchmarks.gpu.kit.sessions import rows_of, session
from benchmarks.gpu.kit.shapes import Shape
from benchmarks.gpu.kit.sizes import Budgets
from benchmarks.results import median_ratio
from benchmarks.workload import batches
from lora_core.base_model.model import BaseModel
from lora_core.peft_format.verify import restored

WARM_STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Tokens, time and loss of one step of every job. `recomputed` is the number of ticks that recomputed blocks."""

    tokens: int
    seconds: float
    loss: float
    ticks: int = 0
    recomputed: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def small(kit: Kit) -> None:
    compare(kit, kit.sizes.small)


def large(kit: Kit) -> None:
    compare(kit, kit.sizes.large)


def compare(kit: Kit, shape: Shape) -> None:
    """Let the contenders take turns. Records every turn, and rates and ratios after each round.

    Every contender has computed each shape of a measured step before. The first step of a new shape also takes time for
    plans and allocations.
    """
    base, many = kit.base(shape), kit.sizes.many
    one = replace(many, num_jobs=1)
    wide = Budgets(tick_tokens=many.largest_tick, job_tokens=many.largest_step, slice_tokens=many.largest_step)
    service = kit.sizes.budgets
    several = f"{many.num_jobs} jobs"
    packed = f"Lorry, {several}"
    contenders: dict[str, Callable[[], Turn]] = {
        packed: lambda: lorry(kit, base, many, service),
        f"PEFT in a loop, {several} one after another": lambda: peft_loop(kit, base, many),
        "Lorry, 1 job": lambda: lorry(kit, base, one, service),
        "PEFT in a loop, 1 job": lambda: peft_loop(kit, base, one),
        f"PEFT with Trainer, {several} one after another": lambda: peft_trainer(kit, base, many),
        f"Lorry, {several} in one tick": lambda: lorry(kit, base, many, wide),
    }
    with kit.attempt(f"{packed}, warm-up, {shape.name}"):
        contenders[packed]()  # its ticks differ from step to step, but are the same in every session
    turns: dict[str, dict[int, Turn]] = {name: {} for name in contenders}
    for number in range(1, 1 + kit.sizes.repeats):
        for name, take in contenders.items():
            with kit.attempt(f"{name}, turn {number}, {shape.name}"):
                turn = turns[name][number] = take()
                kit.tell(f"{name}, turn {number}, {shape.name}", turn.rate, "tokens/s", **_details(turn))
        for name, taken in turns.items():
            if taken:
                middle = sorted(taken.values(), key=lambda turn: turn.rate)[len(taken) // 2]
                told = f"median of {len(taken)}: {name}, {base_name(kit, base)}"
                details = {"ticks": middle.ticks, "recomputed_ticks": middle.recomputed} if middle.ticks else {}
                tell_rate(kit, base, told, rank=many.rank, tokens=middle.tokens, seconds=middle.seconds, **details)
        _tell_ratios(kit, shape, turns, several)


def _details(turn: Turn) -> dict[str, float]:
    of_engine = {"ticks": turn.ticks, "recomputed_ticks": turn.recomputed} if turn.ticks else {}
    return {"seconds": turn.seconds, "loss": turn.loss, **of_engine}


def _tell_ratios(kit: Kit, shape: Shape, turns: dict[str, dict[int, Turn]], several: str) -> None:
    """Compare the turns that succeeded for both contenders."""
    for ours, theirs in (
        (f"Lorry, {several}", f"PEFT in a loop, {several} one after another"),
        (f"Lorry, {several} in one tick", f"PEFT in a loop, {several} one after another"),
        (f"Lorry, {several}", f"PEFT with Trainer, {several} one after another"),
        ("Lorry, 1 job", "PEFT in a loop, 1 job"),
    ):
        both = sorted(turns[ours].keys() & turns[theirs].keys())
        if both:
            ratio = median_ratio(*([turns[name][number].rate for number in both] for name in (ours, theirs)))
            kit.tell(f"{ours} over {theirs}, {shape.name}", ratio, "times", turns=len(both))


def lorry(kit: Kit, base: BaseModel, load: Load, budgets: Budgets) -> Turn:
    """Run warm-up steps of every job, and measure the next one."""
    with session(base, load, chosen(kit), budgets) as opened:
        for _ in range(WARM_STEPS):
            opened.step()
        kit.synchronize()
        started = perf_counter()
        stepped = opened.step()
        kit.synchronize()
        seconds = perf_counter() - started
    return Turn(
        tokens=stepped.tokens,
        seconds=seconds,
        loss=stepped.loss,
        ticks=stepped.ticks,
        recomputed=stepped.recomputed,
    )


def peft_loop(kit: Kit, base: BaseModel, load: Load) -> Turn:
    """Train with PEFT, adapters in the base model's dtype, fused AdamW and padding.

    One adapter trains on the batches of all jobs one after another. New adapters would take as long.
    """
    device = kit.sizes.device
    steps = [{name: part.to(device) for name, part in pad(rows).items()} for rows in _batches(base, load)]
    with adapted(base, load.rank) as model:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

        def train(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        for batch in (steps * WARM_STEPS)[: max(WARM_STEPS, len(steps))]:
            train(batch)
        kit.synchronize()
        started = perf_counter()
        losses = [train(batch) for batch in steps]
        kit.synchronize()
        seconds = perf_counter() - started
        return Turn(tokens=_tokens(steps), seconds=seconds, loss=float(losses[0]))


def peft_trainer(kit: Kit, base: BaseModel, load: Load) -> Turn:
    """Train with PEFT and transformers' Trainer: adapters in float32, autocast and the learning rate are as usual.

    The first batches are warm-up steps, then follow the batches of all jobs one after another.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    batches_of_jobs = _batches(base, load)
    warm = (batches_of_jobs * WARM_STEPS)[: max(WARM_STEPS, len(batches_of_jobs))]
    clock: list[float] = []

    class Timing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (len(warm), len(warm) + len(batches_of_jobs)):
                kit.synchronize()
                clock.append(perf_counter())

    with adapted(base, load.rank, in_float32=True) as model, tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=len(warm) + len(batches_of_jobs),
            per_device_train_batch_size=load.batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            bf16=True,
            use_cpu=not kit.on_gpu,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows: Any = [row for batch in [*warm, *batches_of_jobs] for row in batch]
        trainer = Trainer(model, arguments, data_collator=pad, train_dataset=rows, callbacks=[Timing()])
        result = trainer.train()
    tokens = sum(len(row["input_ids"]) for batch in batches_of_jobs for row in batch)
    return Turn(tokens=tokens, seconds=clock[1] - clock[0], loss=result.training_loss)


@contextmanager
def adapted(base: BaseModel, rank: int, *, in_float32: bool = False) -> Iterator[Any]:
    """Wrap the base model by PEFT within the block, and restore it afterwards, also if PEFT is interrupted halfway.

    Adapters have the base model's dtype, or with `in_float32` PEFT's default.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with base.untouched() as untouched:
        try:
            with restored(untouched):
                model = get_peft_model(cast(Any, untouched), settings, autocast_adapter_dtype=in_float32)
                model.train()
                yield model
        finally:
            untouched.requires_grad_(False).eval()


def _batches(base: BaseModel, load: Load) -> list[list[dict[str, list[int]]]]:
    """Return the rows of one step of each job."""
    return [
        batches(rows_of(load, base.vocab_size, job), batch_size=load.batch_size, num_steps=1)[0]
        for job in range(load.num_jobs)
    ]


def _tokens(steps: list[dict[str, torch.Tensor]]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in steps)

"""Whole ticks on the fake CUDA device of this process. Import it after the device is loaded (build.py)."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoConfig, PreTrainedConfig

from lora_core.base_model import patching
from lora_core.base_model.model import BaseModel, build_model
from lora_core.base_model.patching import Attachment, attention_heads
from lora_core.config import JobConfig, LoraConfig, OptimizerConfig, OptimizerKind, ScheduleConfig
from lora_core.data.token_dataset import TokenDataset
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.forward.generation import Prompts
from lora_core.kernels.selection import Kernels
from lora_core.layers.rms_norm import same_numbers
from lora_core.layers.task_heads import NUM_PLACEHOLDER_CLASSES, head_tensors, set_parameter
from lora_core.runtime import counter_rng
from tests.lora_core.classifiers import FAMILIES, classification_jobs
from tests.lora_core.fake_cuda.kernels import stand_ins
from tests.lora_core.fake_cuda.observer import DeviceCounts, DeviceObserver
from tests.lora_core.scenarios import admit, submissions
from tests.tiny_models import COMMON

DEVICE = "cuda:0"
WIDE = 1 << 20
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "8b": (4096, 14336, 32, 8, 128256),
    "1b": (2048, 8192, 32, 8, 128256),
    "smollm2": (576, 1536, 9, 3, 49152),
}
"""Hidden size, feed-forward size, query heads, key heads and vocabulary of real Llama models."""


def config_of(shape: str, *, num_layers: int, family: str = "llama") -> PreTrainedConfig:
    hidden, feed_forward, heads, key_heads, vocab = SIZES[shape]
    return AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=hidden // heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape != "8b",
    )


def job_of(lora: LoraConfig, *, seed: int = 0, optimizer: OptimizerKind = "adamw", batch_size: int = 4) -> JobConfig:
    return JobConfig(
        lora=lora,
        optimizer=OptimizerConfig(kind=optimizer, learning_rate=1e-4),
        schedule=ScheduleConfig(kind="constant", num_steps=100),
        batch_size=batch_size,
        num_steps=100,
        seed=seed,
        slice_tokens=WIDE,
    )


def measured_tick(
    *,
    shape: str,
    num_layers: int,
    family: str = "llama",
    num_jobs: int = 16,
    rank: int = 16,
    dropout: float = 0.0,
    use_dora: bool = False,
    trained_tokens: int = 0,
    optimizer: OptimizerKind = "adamw",
    batch_size: int = 4,
    modules_to_save: Sequence[str] = (),
    kernels: Mapping[str, str] | None = None,
    dtype: str = "bfloat16",
    checkpointed: bool = False,
) -> dict[str, Any]:
    """Return the counts of the second tick of equal jobs with sequences of 128 tokens, half of them labels."""
    config = config_of(shape, num_layers=num_layers, family=family)
    elementwise = (kernels or {}).get("elementwise", "compiled")
    lora = LoraConfig(
        rank=rank,
        alpha=32,
        dropout=dropout,
        use_dora=use_dora,
        modules_to_save=tuple(modules_to_save),
        trainable_token_indices=tuple(range(trained_tokens)),
    )
    warnings: list[str] = []
    with fake_device(elementwise) as observer:
        with patch.object(patching.LOGGER, "warning", lambda message, *parts: warnings.append(message % parts)):
            base = base_on_device(config, kernels or {}, dtype=dtype)
        engine = Engine(base, engine_config(checkpoint_blocks="always" if checkpointed else "never"))
        for number in range(num_jobs):
            job = job_of(lora, seed=number, optimizer=optimizer, batch_size=batch_size)
            engine.admit(str(number), job, _rows(config.vocab_size))
        with observer.counting():
            engine.tick()
        with observer.counting() as counts:
            engine.tick()
        assert [engine.progress(job)[0] for job in engine.jobs()] == [2] * num_jobs
        sizes = {
            "base_bytes": base.num_bytes,
            "adapter_bytes": engine.memory()["adapter_bytes"],
            "elementwise_kernels": engine.elementwise_kernels,
            "assumed_bytes_per_token": engine.activations.bytes_per_token,
            "warnings": warnings,
        }
    return _report(counts) | sizes


def measured_initialization(*, shape: str, num_layers: int, rank: int) -> dict[str, Any]:
    """Return the counts of the admission of a job, and the random numbers that the host draws for it."""
    config = config_of(shape, num_layers=num_layers)
    job = job_of(LoraConfig(rank=rank, alpha=32))
    drawn: list[int] = []
    random_words = counter_rng.random_words

    def counted(*key: int | str, count: int) -> Any:
        drawn.append(count)
        return random_words(*key, count=count)

    with fake_device() as observer, patch.object(counter_rng, "random_words", counted):
        engine = Engine(base_on_device(config, {}), engine_config())
        with observer.counting() as counts:
            engine.admit("job", job, _rows(config.vocab_size))
        is_started = engine._jobs["job"].starting is None
    return _report(counts) | {"drawn_on_host": sum(drawn), "is_started": is_started}


def measured_answers(*, num_layers: int, num_prompts: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the counts of the pass that adds a second token to each answer, for adapters of two jobs."""
    config = AutoConfig.for_model("llama", **(COMMON | {"num_hidden_layers": num_layers}))
    jobs = submissions("llama")
    names = ("plain", "wide")
    with fake_device() as observer:
        engine = Engine(base_on_device(config, {}, dtype=dtype), engine_config(token_budget=4096))
        for name in names:
            admit(engine, name, jobs[name])
        prompts = Prompts(prompts=((5, 6, 7),) * num_prompts, max_tokens=4)
        answers = engine.generation(dict.fromkeys(names, prompts))
        answers.advance()
        with observer.counting() as counts:
            answers.advance()
        assert [len(ids) for of_job in answers.answers().values() for ids in of_job] == [2] * 2 * num_prompts
    return _report(counts)


def run_jobs(*, family: str, task: str = "causal-lm", dtype: str = "bfloat16") -> dict[str, Any]:
    """Run all kinds of jobs in one pack to their end. Returns the steps of each and the most waits of a tick."""
    is_causal = task == "causal-lm"
    jobs = submissions(family) if is_causal else classification_jobs(with_types=family == "bert")
    sizes = COMMON | FAMILIES[family]
    config = AutoConfig.for_model(family, **sizes)
    waits: list[Counter[tuple[str, str]]] = []
    with fake_device() as observer:
        base = base_on_device(config, {}, task=task, dtype=dtype)
        engine = Engine(base, engine_config(token_budget=512, checkpoint_blocks="never"))
        for name, submission in jobs.items():
            admit(engine, name, submission)
        while not engine.idle:
            with observer.counting() as counts:
                engine.tick()
            waits.append(counts.waits)
        steps = {job: engine.progress(job)[0] for job in engine.jobs()}
    most = max(waits, key=Counter.total)
    return {"steps": steps, "most_waits": {f"{phase} {name}": count for (phase, name), count in most.items()}}


def take_snapshots(*, family: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Take the snapshots of a checkpoint for jobs of all kinds. Returns waits of the host and copies, by job."""
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family]))
    found: dict[str, Any] = {}
    with fake_device() as observer:
        base = base_on_device(config, {}, dtype=dtype)
        engine = Engine(base, engine_config(token_budget=512, checkpoint_blocks="never"))
        for name, submission in submissions(family).items():
            admit(engine, name, submission)
            engine.checkpoint_snapshot(name)  # the first one completes the initialization
            with observer.counting() as counts:
                snapshots = engine.checkpoint_snapshot(name), engine.adapter_snapshot(name, base_name="base")
            waits = _report(counts)["waits"]
            found[name] = {"waits": waits, "downloads": counts.downloads}
            with observer.counting() as counts:
                for snapshot in snapshots:
                    snapshot.vectors.on_host()
            found[name]["waits_of_writer"] = _report(counts)["waits"]
            engine.evict(name)
    return found


@contextmanager
def fake_device(elementwise: str = "compiled") -> Iterator[DeviceObserver]:
    observer = DeviceObserver()
    reason = None if elementwise == "compiled" else "eager operations are wanted"
    patches: dict[str, Any] = {
        "lora_core.engine.engine.measure_invariance": lambda *_: "allclose",
        "lora_core.kernels.accumulation.adds_in_float32": lambda *_: True,
        "lora_core.kernels.gpu.comparison.compare": lambda family, *_: reason if family == "elementwise" else None,
        **{f"lora_core.layers.{name}.same_numbers": _is_same for name in ("residual_block", "swiglu")},
        "lora_core.layers.rms_norm._agrees": _norm_agrees,
        "lora_core.layers.rotary._agrees": _is_same,
        "lora_core.kernels.kv_cache.address_of": lambda _tensor: 1 << 20,
        "lora_core.layers.tiled_lora.addresses_of": lambda _adapter, layout: layout.offsets,
        "torch.Tensor.backward": _observed_backward(observer),
        # One copy, and not one for each element.
        "torch._subclasses.fake_tensor.FakeTensor.tolist": lambda tensor: tensor.cpu().tolist(),
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.current_stream": lambda _device: None,
        "torch.cuda.Event": partial(_Event, observer),
        # It repeats its drawing until no number lies outside, which a value of one never ends.
        "transformers.initialization.trunc_normal_": lambda tensor, *_, **__: tensor,
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, stand_ins(observer)))
        for name, stand_in in patches.items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(observer)


class _Event:
    """An event of the device, for which the host waits by `synchronize`."""

    def __init__(self, observer: DeviceObserver, *, blocking: bool) -> None:
        self._observer = observer
        self._is_recorded = False

    def record(self, stream: None) -> None:
        self._is_recorded = True

    def synchronize(self) -> None:
        assert self._is_recorded
        self._observer.counts.waits[self._observer.phase, "event"] += 1


def _is_same(*_: Any, **__: Any) -> bool:
    """Kernels agree with the operations that they replace: there are no numbers to compare."""
    return True


def _norm_agrees(module: nn.Module, eps: float) -> bool:
    """Compare a norm of the same class on the host, where it has numbers, with the formula of RmsNorm."""
    dtype = next(module.parameters()).dtype
    with _disable_current_modes():
        norm = cast(Any, type(module))(64, eps=eps).to(dtype)
        x_TD = torch.sin(torch.arange(16 * 64) * 0.7).view(16, 64).to(dtype)
        wide_TD = x_TD.float()
        normed_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
        return same_numbers(norm(x_TD), norm.weight * normed_TD.to(dtype))


def _observed_backward(observer: DeviceObserver) -> Callable[..., None]:
    original = torch.Tensor.backward

    def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        observer.begins_backward()
        original(tensor, *args, **kwargs)
        observer.ends_backward()

    return backward


def base_on_device(
    config: PreTrainedConfig, kernels: Mapping[str, str], *, task: str = "causal-lm", dtype: str = "bfloat16"
) -> BaseModel:
    config.dtype = torch_dtype = getattr(torch, dtype)
    with torch.device(DEVICE):
        model = build_model(config, cast(Any, task))
    if task != "causal-lm":
        for tensor in head_tensors(model, NUM_PLACEHOLDER_CLASSES):
            set_parameter(model, tensor.name, tensor.start(0).to(DEVICE, torch_dtype))
    model.requires_grad_(False).eval()
    heads = attention_heads(config)
    assert heads is not None
    sizes = dict.fromkeys(("tiled_head_size", "decoding_head_size"), heads.size)
    chosen = Kernels(lora="tiled", attention="varlen", **sizes, elementwise="compiled")
    if dtype == "float32":
        chosen = replace(chosen, lora="loop", attention="sequences")  # neither kernel takes it
    base = BaseModel(model=model, dtype=torch_dtype, device=DEVICE, task=cast(Any, task))
    base.attachment = Attachment(model, replace(chosen, **cast(Any, kernels)))
    return base


def engine_config(**options: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"token_budget": WIDE, "max_tick_seconds": 3600.0, "job_tokens": WIDE}
    return EngineConfig(**(defaults | options))


def _rows(vocab: int, *, length: int = 128, num_rows: int = 32) -> TokenDataset:
    return TokenDataset(
        input_ids=np.arange(length * num_rows, dtype=np.int32) % vocab,
        loss_mask=np.tile((np.arange(length) >= length // 2).astype(np.uint8), num_rows),
        row_offsets=np.arange(0, length * num_rows + 1, length),
    )


def _report(counts: DeviceCounts) -> dict[str, Any]:
    return {
        "launches": {phase: counts.num_launches(phase) for phase in ("forward", "backward", "update")},
        "operators": {f"{phase} {name}": count for (phase, name), count in sorted(counts.launches.items())},
        "waits": {f"{phase} {name}": count for (phase, name), count in sorted(counts.waits.items())},
        "uploads": counts.uploads.total(),
        "flops": counts.flops,
        "largest_bytes": counts.largest_bytes,
        "kept_bytes": counts.kept_bytes - counts.resident_bytes,
        "resident_bytes": counts.resident_bytes,
    }

"""Activation checkpointing recomputes blocks and changes no bit. On a GPU, free memory decides whether it is used."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from catalog.resources.memory import BaseModelMemory
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError
from lora_core.events import JobStepped
from lora_core.layers import activation_checkpointing
from lora_core.layers.activation_checkpointing import ActivationMemory
from tests.lora_core.scenarios import Submission, config, dataset

GIB = 2**30


def jobs(family: str) -> dict[str, Submission]:
    """Return jobs with mixed ranks and targets, dropout, several slices per step, and the last block only."""
    top = {"llama": "layers.1.self_attn.o_proj", "gpt2": "h.1.attn.c_proj"}[family]
    return {
        "plain": Submission(config=config(seed=1, num_steps=2), train=dataset(1, [7, 12, 30, 5])),
        "dropout": Submission(
            config=config(rank=8, dropout=0.25, batch_size=3, seed=2, num_steps=2, slice_tokens=40),
            train=dataset(2, [33, 21, 9, 2, 30]),
        ),
        "top_only": Submission(config=config(rank=3, targets=top, num_steps=2, seed=4), train=dataset(4, [16, 17])),
    }


def trained(base: BaseModel, mode: str) -> tuple[dict[str, Tensor], list[JobStepped]]:
    """Return the final weights of each job and sorted steps, because timing affects which steps share a tick."""
    base.attachment = Attachment(base.model)
    engine = Engine(base, EngineConfig(checkpoint_blocks=mode))  # pyright: ignore[reportArgumentType]
    for name, job in jobs(base.model.config.model_type).items():
        engine.admit(name, job.config, job.train)
    steps: list[JobStepped] = []
    while not engine.idle:
        steps += [event for event in engine.tick() if isinstance(event, JobStepped)]
    weights = {name: job.adapter.p.clone() for name, job in engine._jobs.items()}
    base.attachment.detach()
    return weights, sorted(steps, key=lambda step: (step.job, step.step))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "checkpointed" or "kept" for each block forward in a pack with autograd enabled, in order."""
    ran: list[str] = []
    original = activation_checkpointing.checkpointed

    def noted(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
        pack = activation_checkpointing.current_pack()
        if pack is not None and torch.is_grad_enabled():
            ran.append("checkpointed" if pack.is_checkpointed else "kept")
        return original(forward, *args, **kwargs)

    monkeypatch.setattr("lora_core.base_model.patching.checkpointed", noted)
    return ran


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_no_bit(
    load: Callable[..., BaseModel], forwards: list[str], family: str, dtype: str
) -> None:
    kept, kept_steps = trained(load(family, dtype), "never")
    assert set(forwards) == {"kept"}

    checkpointed, steps = trained(load(family, dtype), "always")

    assert "checkpointed" in forwards
    assert steps == kept_steps
    assert all(step.grad_norm > 0 for step in steps)
    for name, weights in kept.items():
        assert torch.equal(checkpointed[name], weights), name


def test_checkpointed_tick_saves_less_between_forward_and_backward(load: Callable[..., BaseModel]) -> None:
    kept = {mode: largest_kept(load("llama"), mode) for mode in ("never", "always")}

    assert kept["always"] < 0.5 * kept["never"]


def largest_kept(base: BaseModel, mode: str) -> int:
    """Return the bytes that autograd saves in one tick's forward. A checkpointed block saves nothing of its own."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    engine = Engine(base, EngineConfig(checkpoint_blocks=mode))  # pyright: ignore[reportArgumentType]
    engine.admit("job", config(num_steps=1), dataset(1, [60, 60]))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        engine.tick()
    return sum(saved.values())


def test_a_backward_in_another_thread_finds_its_pack(load: Callable[..., BaseModel], monkeypatch) -> None:
    """On a GPU, autograd has one thread per device."""
    original = Tensor.backward

    def elsewhere(tensor: Tensor) -> None:
        thread = threading.Thread(target=original, args=(tensor,))
        thread.start()
        thread.join()

    expected, _ = trained(load("llama"), "always")
    monkeypatch.setattr(Tensor, "backward", elsewhere)
    found, _ = trained(load("llama"), "always")

    assert all(torch.equal(found[name], weights) for name, weights in expected.items())


def test_unknown_mode_is_rejected_by_name() -> None:
    with pytest.raises(ConfigError, match="checkpoint_blocks"):
        EngineConfig(checkpoint_blocks="sometimes")  # pyright: ignore[reportArgumentType]


class Card:
    """Simulates torch's memory statistics of a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free: int) -> None:
        self.free, self.reserved, self.allocated, self.peak = free, 0, 0, 0
        for name, replacement in {
            "mem_get_info": lambda device: (self.free, 80 * GIB),
            "memory_reserved": lambda device: self.reserved,
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.allocated),
        }.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    def tick(self, memory: ActivationMemory, num_tokens: int, *, taken: int) -> None:
        with memory.observed(num_tokens, kind="train", checkpointed=False):
            self.peak = self.allocated + taken


def on_a_gpu(mode: str = "auto") -> ActivationMemory:
    linears: dict[str, nn.Module] = {"layer": nn.Linear(600, 424, device="meta")}  # 1,024 inputs and outputs
    return ActivationMemory(linears, device="cuda:0", item_bytes=2, mode=mode)  # pyright: ignore[reportArgumentType]


def test_initial_estimate_per_token_is_inputs_and_outputs_of_linears(monkeypatch) -> None:
    Card(monkeypatch, free=GIB)
    memory = on_a_gpu()

    assert memory.bytes_per_token == pytest.approx(1.25 * 2 * 1024)
    assert not memory.checkpoints(370_000)
    assert memory.checkpoints(380_000)


@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_initial_estimate_with_compiled_kernels_is_that_of_the_service(shape: str) -> None:
    """An 8B base model and 16 jobs leave 55 GB of an H100, and the service's ticks of 8,192 tokens keep 31 GB."""
    hidden, feed_forward, keys, layers = {"1b": (2048, 8192, 512, 16), "8b": (4096, 14336, 1024, 32)}[shape]
    outputs = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    outputs |= {"gate_proj": feed_forward, "up_proj": feed_forward, "down_proj": hidden}
    inputs = dict.fromkeys(outputs, hidden) | {"down_proj": feed_forward}
    linears: dict[str, nn.Module] = {
        f"layers.{layer}.{name}": nn.Linear(inputs[name], outputs[name], device="meta")
        for layer in range(layers)
        for name in outputs
    }
    shapes = {name: [[outputs[name], inputs[name]], layers] for name in outputs}

    compiled, single = (
        ActivationMemory(linears, device="cuda:0", item_bytes=2, mode="auto", is_compiled=is_compiled).bytes_per_token
        for is_compiled in (True, False)
    )

    base = BaseModelMemory({"linear_shapes": shapes}, "bfloat16", kernels="cuda")
    assert compiled == 1.25 * base.activation_bytes_per_token()
    assert single == 1.25 * 2 * layers * (sum(outputs.values()) + sum(inputs.values()))
    assert shape != "8b" or 8192 * compiled < 0.9 * 55e9 < 8192 * single


def test_initial_estimate_counts_all_inputs_without_gated_mlps() -> None:
    linears: dict[str, nn.Module] = {name: nn.Linear(8, 8, device="meta") for name in ("q_proj", "k_proj", "fc1")}

    memory_of_gpu = ActivationMemory(linears, device="cuda:0", item_bytes=2, mode="auto", is_compiled=True)

    assert memory_of_gpu.bytes_per_token == 1.25 * 2 * 3 * 16


def test_ticks_measure_bytes_per_token_unless_small_or_failed(monkeypatch) -> None:
    card = Card(monkeypatch, free=GIB)
    memory = on_a_gpu()
    card.allocated = 5 * GIB

    card.tick(memory, 100, taken=GIB)
    with pytest.raises(torch.OutOfMemoryError), memory.observed(1000, kind="train", checkpointed=False):
        raise torch.OutOfMemoryError
    with memory.observed(1000, kind="evaluate", checkpointed=False):
        card.peak = 9 * GIB
    assert memory.bytes_per_token == pytest.approx(1.25 * 2 * 1024)

    card.tick(memory, 1024, taken=2**20)
    assert memory.bytes_per_token == 2**20 / 1024
    card.tick(memory, 1024, taken=2**19)
    assert memory.bytes_per_token == 2**20 / 1024
    assert memory.peak_bytes() == 9 * GIB
    card.allocated = 0
    memory.restart_peak()
    card.tick(memory, 1024, taken=GIB)
    card.tick(memory, 1024, taken=2**20)
    assert memory.peak_bytes() == GIB


def test_new_job_may_take_more_than_was_measured(monkeypatch) -> None:
    card = Card(monkeypatch, free=GIB)
    memory = on_a_gpu()
    estimate = memory.bytes_per_token
    memory.expect()
    assert memory.bytes_per_token == estimate
    card.tick(memory, 1024, taken=2**20)

    for _ in range(2):
        memory.expect()
        assert memory.bytes_per_token == 1.25 * 2**20 / 1024
    card.tick(memory, 1024, taken=2**19)
    assert memory.bytes_per_token == 2**19 / 1024


def test_memory_cached_by_torch_counts_as_free(monkeypatch) -> None:
    card = Card(monkeypatch, free=0)
    memory = on_a_gpu()
    assert memory.checkpoints(1000)

    card.reserved, card.allocated = 3 * GIB, 2 * GIB

    assert not memory.checkpoints(1000)


def test_rank_with_the_least_memory_decides_for_all(monkeypatch) -> None:
    card = Card(monkeypatch, free=4 * GIB)
    memory = on_a_gpu()
    own = memory.own_memory()
    assert own == (4 * GIB, int(memory.bytes_per_token))
    assert not memory.checkpoints(1_000_000)

    memory.adopt_ranks(own, [own, (GIB, own[1])])
    assert memory.checkpoints(1_000_000)
    assert not memory.checkpoints(300_000)
    memory.adopt_ranks(own, [own, (4 * GIB, 100 * own[1])])
    assert memory.checkpoints(300_000)
    memory.adopt_ranks(own, [own, own])
    assert not memory.checkpoints(1_000_000)

    card.free = 2 * GIB
    memory.adopt_ranks((4 * GIB, own[1]), [(4 * GIB, own[1]), (3 * GIB, own[1])])
    assert not memory.checkpoints(360_000), "the other rank's shortfall is subtracted from the memory that is free now"
    assert memory.checkpoints(450_000)


def test_out_of_memory_makes_later_ticks_of_that_size_checkpointed(monkeypatch) -> None:
    card = Card(monkeypatch, free=GIB)
    memory = on_a_gpu()
    assert not memory.checkpoints(1000)

    card.free = 0  # the error keeps the tick's memory alive
    assert memory.force_checkpointing(1000)
    card.free = GIB

    assert memory.checkpoints(1000)
    assert not memory.checkpoints(900)


def test_measurements_are_discarded_when_a_job_leaves(load: Callable[..., BaseModel], monkeypatch) -> None:
    card = Card(monkeypatch, free=GIB)
    engine, memory = Engine(load("llama"), EngineConfig()), on_a_gpu()
    engine._memory._activations = memory
    guessed = memory.bytes_per_token
    for name in ("dear", "other"):
        engine.admit(name, config(num_steps=1), dataset(1, [9, 14]))
    card.tick(memory, 1024, taken=2**25)
    memory.force_checkpointing(1000)
    assert memory.checkpoints(1000)

    engine.evict("dear")

    assert not memory.checkpoints(1000)
    assert memory.bytes_per_token == guessed
    card.tick(memory, 1024, taken=2**19)
    assert memory.bytes_per_token == 2**19 / 1024


def test_cpu_never_checkpoints_in_auto_mode_and_other_modes_are_fixed() -> None:
    linears: dict[str, nn.Module] = {"layer": nn.Linear(8, 8)}

    on_a_cpu = ActivationMemory(linears, device="cpu", item_bytes=2, mode="auto")

    assert not on_a_cpu.checkpoints(10**12)
    assert not on_a_cpu.force_checkpointing(1)
    assert on_a_gpu("always").checkpoints(1)
    assert not on_a_gpu("never").checkpoints(10**12)
    assert not on_a_gpu("never").force_checkpointing(1)


def test_out_of_memory_tick_is_retried_checkpointed_before_it_is_split(
    load: Callable[..., BaseModel], monkeypatch, forwards: list[str]
) -> None:
    base = load("llama")
    engine = Engine(base, EngineConfig())
    engine.admit("job", config(num_steps=1), dataset(1, [9, 14]))
    monkeypatch.setattr(engine.activations, "force_checkpointing", lambda *_, **__: True)
    monkeypatch.setattr(engine.activations, "checkpoints", lambda *_, **__: len(forwards) > 0)
    attempts: list[bool] = []
    original = engine._passes._run_lanes

    def short_of_memory(*args, checkpointed: bool, **kwargs):
        attempts.append(checkpointed)
        result = original(*args, checkpointed=checkpointed, **kwargs)
        if not checkpointed:
            raise torch.OutOfMemoryError
        return result

    monkeypatch.setattr(engine._passes, "_run_lanes", short_of_memory)
    forwards.clear()
    events = [event for _ in range(2) for event in engine.tick()]

    assert attempts == [False, True]
    (step,) = (event for event in events if isinstance(event, JobStepped))
    (expected,) = (event for event in alone(load("llama")) if isinstance(event, JobStepped))
    assert step == expected


def alone(base: BaseModel) -> list[object]:
    engine = Engine(base, EngineConfig())
    engine.admit("job", config(num_steps=1), dataset(1, [9, 14]))
    return [event for _ in range(2) for event in engine.tick()]

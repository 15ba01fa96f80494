"""Memory of a base while it is sharded or offloaded to the CPU, tested without other ranks."""

import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_core.base_model.blocks import find_blocks
from lora_core.base_model.model import load_base
from lora_core.base_model.sharding import EXACT_PINNING, _pin_exactly, allocated_bytes, offloads, shard
from lora_core.distributed.ranks import Ranks
from lora_core.errors import ConfigError
from lora_core.peft_format import verify


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sharding_converts_one_block_at_a_time_to_the_dtype_of_the_job(base_dirs, monkeypatch, family):
    """A stub takes the library's place. Like the library, it replaces the parameters of a block by shards."""
    blocks: list[nn.Module] = []
    sharded: list[weakref.ref[nn.Parameter]] = []

    def keep(model: nn.Module, requires_grad: bool) -> nn.Module:
        blocks.extend(find_blocks(model).modules)  # pyright: ignore[reportArgumentType]
        return usual(model, requires_grad)

    def divide(module: nn.Module, **_: Any) -> None:
        assert not any(weight() is not None for weight in sharded), "a sharded block is also kept in full"
        if module not in blocks:
            return
        assert dtypes_of(module) == {torch.bfloat16}
        blocks.remove(module)
        assert all(dtypes_of(later) == {torch.float32} for later in blocks), "a later block was converted too early"
        for part in module.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                sharded.append(weakref.ref(weight))
                setattr(part, name, nn.Parameter(weight.flatten()[:1].clone(), requires_grad=False))

    usual = nn.Module.requires_grad_
    monkeypatch.setattr(nn.Module, "requires_grad_", keep)
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", divide)

    base = load_base(base_dirs[family], dtype="bfloat16", device="cpu", strategy="fsdp2", ranks=Ranks(rank=0, size=2))

    assert sharded
    assert blocks == []
    assert dtypes_of(base.model) == {torch.bfloat16}


def dtypes_of(module: nn.Module) -> set[torch.dtype]:
    return {weight.dtype for weight in module.parameters()}


def test_bytes_are_counted_on_their_own_device():
    weight = torch.zeros(3, 5)
    assert (allocated_bytes(weight, "cpu"), allocated_bytes(weight, "cuda")) == (60, 0)


def test_sharded_weight_counts_the_bytes_of_its_shard():
    weight = torch.zeros(0)
    weight.ds_tensor = torch.zeros(7)  # pyright: ignore[reportAttributeAccessIssue]
    assert allocated_bytes(weight, "cpu") == 28


def test_exact_pinning_keeps_other_allocator_settings():
    before = torch._C._accelerator_getAllocatorSettings()
    try:
        torch._C._accelerator_setAllocatorSettings("max_split_size_mb:64")
        _pin_exactly()
        assert torch._C._accelerator_getAllocatorSettings() == f"max_split_size_mb:64,{EXACT_PINNING}"
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


def test_torch_that_does_not_know_exact_pinning_is_no_error(monkeypatch, caplog):
    def unknown(_: str) -> None:
        raise ValueError("Unrecognized key 'pinned_max_round_threshold_mb'")

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", unknown)

    _pin_exactly()

    assert "Unrecognized key" in caplog.text


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_offload", "zero3_offload"])
def test_sharding_on_one_rank_is_rejected(load, strategy):
    with pytest.raises(ConfigError, match="has only one"):
        shard(load("llama").model, strategy, Ranks(), device="cpu", dtype=torch.float32)


def test_offloading_strategies_are_recognized_by_name():
    assert [offloads(name) for name in ("replicated", "fsdp2", "zero3")] == [False] * 3
    assert offloads("fsdp2_offload")
    assert offloads("zero3_offload")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_verification_moves_the_adapter_but_not_the_base_to_the_device(load):
    model = load("llama").model
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    try:
        verify._bring(adapted, "meta")  # pyright: ignore[reportArgumentType]

        devices = {"lora_" in name: set() for name, _ in adapted.named_parameters()}
        for name, parameter in adapted.named_parameters():
            devices["lora_" in name].add(parameter.device.type)
        assert devices == {True: {"meta"}, False: {"cpu"}}
    finally:
        adapted.unload()

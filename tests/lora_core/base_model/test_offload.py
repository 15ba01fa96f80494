"""Memory of a base on one rank, CPU offload and pinned memory, tested without other ranks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_core.base_model.sharding import EXACT_PINNING, _pin_exactly, allocated_bytes, offloads, shard
from lora_core.distributed.ranks import Ranks
from lora_core.errors import ConfigError
from lora_core.peft_format import verify


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

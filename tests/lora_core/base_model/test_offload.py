"""What a rank holds of a base, and what is done about memory of the host, without any other rank."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_core.base_model.sharding import EXACT_PINNING, _pin_exactly, allocated_bytes, offloads, shard
from lora_core.distributed.ranks import Ranks
from lora_core.errors import ConfigError
from lora_core.peft_format import verify


def test_bytes_are_counted_in_the_memory_that_they_are_in():
    weight = torch.zeros(3, 5)
    assert (allocated_bytes(weight, "cpu"), allocated_bytes(weight, "cuda")) == (60, 0)


def test_a_base_that_is_emptied_counts_by_its_share():
    weight = torch.zeros(0)
    weight.ds_tensor = torch.zeros(7)  # pyright: ignore[reportAttributeAccessIssue]
    assert allocated_bytes(weight, "cpu") == 28


def test_memory_is_pinned_exactly_beside_what_else_is_set():
    before = torch._C._accelerator_getAllocatorSettings()
    try:
        torch._C._accelerator_setAllocatorSettings("max_split_size_mb:64")
        _pin_exactly()
        assert torch._C._accelerator_getAllocatorSettings() == f"max_split_size_mb:64,{EXACT_PINNING}"
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_offload", "zero3_offload"])
def test_one_rank_alone_divides_nothing(load, strategy):
    with pytest.raises(ConfigError, match="there is one"):
        shard(load("llama").model, strategy, Ranks(), device="cpu", dtype=torch.float32)


def test_which_strategies_use_the_host_is_in_their_names():
    assert [offloads(name) for name in ("replicated", "fsdp2", "zero3")] == [False] * 3
    assert offloads("fsdp2_offload")
    assert offloads("zero3_offload")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_to_be_verified_an_adapter_is_brought_to_the_device_though_the_base_is_elsewhere(load):
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

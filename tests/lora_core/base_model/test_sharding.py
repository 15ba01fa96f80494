"""Memory of each process while a base is sharded.

The results of sharded bases are tested in tests/lora_core/distributed/test_ranks.py.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.base_model.blocks import find_blocks
from lora_core.base_model.model import load_base
from lora_core.distributed.ranks import Ranks


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

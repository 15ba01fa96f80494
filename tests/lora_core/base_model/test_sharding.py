"""What dividing a base asks of the memory of each process. What it computes is tested in
tests/lora_core/distributed/test_ranks.py."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.base_model.blocks import find_blocks
from lora_core.base_model.model import load_base
from lora_core.distributed.ranks import Ranks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_a_base_that_is_divided_one_block_at_a_time_is_held_as_the_job_wants_it(base_dirs, monkeypatch, family):
    """In the library's place stands what replaces a block's parameters by shares of them, as it does."""
    blocks: list[nn.Module] = []
    divided: list[weakref.ref[nn.Parameter]] = []

    def keep(model: nn.Module, requires_grad: bool) -> nn.Module:
        blocks.extend(find_blocks(model).modules)  # pyright: ignore[reportArgumentType]
        return usual(model, requires_grad)

    def divide(module: nn.Module, **_: Any) -> None:
        assert not any(weight() is not None for weight in divided), "a block that is divided is held whole as well"
        if module not in blocks:
            return
        assert dtypes_of(module) == {torch.bfloat16}
        blocks.remove(module)
        assert all(dtypes_of(later) == {torch.float32} for later in blocks), "it is not its turn"
        for part in module.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                divided.append(weakref.ref(weight))
                setattr(part, name, nn.Parameter(weight.flatten()[:1].clone(), requires_grad=False))

    usual = nn.Module.requires_grad_
    monkeypatch.setattr(nn.Module, "requires_grad_", keep)
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", divide)

    base = load_base(base_dirs[family], dtype="bfloat16", device="cpu", strategy="fsdp2", ranks=Ranks(rank=0, size=2))

    assert divided
    assert blocks == []
    assert dtypes_of(base.model) == {torch.bfloat16}


def dtypes_of(module: nn.Module) -> set[torch.dtype]:
    return {weight.dtype for weight in module.parameters()}

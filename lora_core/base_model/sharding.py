# pyright: basic
"""Shards a base model's blocks over the ranks of a trainer, by FSDP2 (torch) or ZeRO-3 (DeepSpeed).

A rank has a whole block only while the block computes. Shards are in device memory or, with offload, in host memory.
Embeddings, final norm and head are replicated, because the loss reads the head outside any module. Adapters are not
part of the model. A block is all-gathered by collectives, so every rank must pass through all blocks equally often
(lora_core/engine/step.py).
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lora_core.base_model.blocks import find_blocks
from lora_core.distributed.ranks import Ranks
from lora_core.errors import ConfigError, UnsupportedModel

LOGGER = logging.getLogger(__name__)
Strategy = Literal["replicated", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"]
"""Each rank holds a full replica, or a shard of each block by one of the libraries, on its device or in host memory."""
EXACT_PINNING = "pinned_max_round_threshold_mb:1"
"""Setting of torch's allocator that stops rounding pinned memory up to a power of two, which can double it."""


def offloads(strategy: Strategy) -> bool:
    """Return whether the shards are in host memory."""
    return strategy.endswith("_offload")


def shard(model: PreTrainedModel, strategy: Strategy, ranks: Ranks, *, device: str, dtype: torch.dtype) -> None:
    """Shard the blocks in place and move the rest to `device`, all in `dtype`.

    The weights may be memory-mapped in any dtype. A rank holds a whole block only while that block is being sharded.
    Raises UnsupportedModel if no blocks are found, and ConfigError if the library is missing or there is only one rank.
    """
    blocks = find_blocks(model).modules
    if not blocks:
        raise UnsupportedModel(
            f"{type(model).__name__} can't be sharded: its blocks were not found.",
            remedy="Use the strategy 'replicated' on devices that can hold the whole model.",
        )
    if ranks.size == 1:
        raise ConfigError(
            f"The strategy {strategy!r} needs at least two processes, but the trainer has only one.",
            remedy="Give the trainer more devices, or use the strategy 'replicated'.",
        )
    rest = set(model.parameters()) - {parameter for block in blocks for parameter in block.parameters()}
    for parameter in rest:
        parameter.data = parameter.data.to(device, dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    is_offloaded = offloads(strategy)
    if is_offloaded and device.startswith("cuda"):
        _pin_exactly()
    if strategy.startswith("fsdp2"):
        _by_fsdp2(model, blocks, rest, ranks, device=device, dtype=dtype, is_offloaded=is_offloaded)
    else:
        _by_zero3(model, blocks, rest, device=device, dtype=dtype, is_offloaded=is_offloaded)


def _pin_exactly() -> None:
    """Append the setting to existing ones. Versions of torch without it (before 2.13) round up."""
    settings = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if settings is None:
        return
    try:
        torch._C._accelerator_setAllocatorSettings(",".join(filter(None, (settings(), EXACT_PINNING))))
    except (RuntimeError, ValueError) as error:
        LOGGER.warning(
            "torch %s can't pin memory exactly, so pinning can take twice as much: %s", torch.__version__, error
        )


def _cast(block: nn.Module, dtype: torch.dtype) -> None:
    """Cast a block just before it is sharded. Casting all of them at once would load the whole model on every host."""
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)


def is_whole(weight: Tensor) -> bool:
    """Return whether this rank can read the weight now. False for a sharded block that is not computing."""
    return not isinstance(weight, DTensor) and not (hasattr(weight, "ds_id") and weight.numel() == 0)


def allocated_bytes(weight: Tensor, kind: str) -> int:
    """Return the bytes that this rank allocates in memory of that kind ("cpu" or "cuda") while no block computes."""
    share = weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)
    return share.nbytes if share.device.type == kind else 0


@contextmanager
def allow_unsharded(model: PreTrainedModel, strategy: Strategy) -> Iterator[None]:
    """Allow unsharded parameters in blocks, as PEFT adds them, within the block of code. Without gradients.

    DeepSpeed treats all parameters of a block as its own. Its hooks are therefore removed, and its own parameters are
    gathered block by block with GatheredParameters.
    """
    if not strategy.startswith("zero3"):
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    blocks = find_blocks(model).modules
    own = {block: [parameter for parameter in block.parameters() if hasattr(parameter, "ds_id")] for block in blocks}
    hooked = (model.base_model, *blocks)
    kept = {module: (module._forward_pre_hooks, module._forward_hooks) for module in hooked}
    gathered: list[Any] = []

    def gather(block: nn.Module, _inputs: Any) -> None:
        gathered.append(deepspeed.zero.GatheredParameters(own[block]))
        gathered[-1].__enter__()

    def release(_block: nn.Module, _inputs: Any, _output: Any) -> None:
        gathered.pop().__exit__(None, None, None)

    try:
        for module in hooked:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        for block in blocks:
            block.register_forward_pre_hook(gather)
            block.register_forward_hook(release)
        yield
    finally:
        while gathered:
            gathered.pop().__exit__(None, None, None)
        for module, (before, after) in kept.items():
            module._forward_pre_hooks, module._forward_hooks = before, after


def _by_fsdp2(
    model: PreTrainedModel,
    blocks: tuple[nn.Module, ...],
    rest: set[nn.Parameter],
    ranks: Ranks,
    *,
    device: str,
    dtype: torch.dtype,
    is_offloaded: bool,
) -> None:
    """Shard by FSDP2. It replaces the parameters of a block, so keep no reference to the old ones, which stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    kind = torch.device(device).type
    mesh = init_device_mesh(kind, (ranks.size,))
    policy = CPUOffloadPolicy(pin_memory=kind == "cuda") if is_offloaded else OffloadPolicy()
    for block in blocks:
        _cast(block, dtype)
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model.base_model, mesh=mesh, ignored_params=rest, offload_policy=policy)


def _by_zero3(
    model: PreTrainedModel,
    blocks: tuple[nn.Module, ...],
    rest: set[nn.Parameter],
    *,
    device: str,
    dtype: torch.dtype,
    is_offloaded: bool,
) -> None:
    """Shard by ZeRO-3. Each block is a leaf module, which DeepSpeed gathers at once before its forward and backward."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it on import
    try:
        import deepspeed  # pyright: ignore[reportMissingImports]
        from deepspeed.utils import set_z3_leaf_modules  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "The strategies 'zero3' and 'zero3_offload' need DeepSpeed, which is not installed.",
            remedy="Install lorry-server[deepspeed] on the worker, or use 'fsdp2' or 'fsdp2_offload'.",
        ) from error
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    config = _zero3_config(dtype, of_block=largest)
    if is_offloaded:
        pinned = {"device": "cpu", "pin_memory": device.startswith("cuda")}
        config["zero_optimization"] |= {"offload_param": pinned}
    set_z3_leaf_modules(model, list({type(block) for block in blocks}))
    for block in blocks:
        _cast(block, dtype)
        deepspeed.zero.Init(module=block, config_dict_or_path=config)
    with _hidden(model.base_model, rest):
        deepspeed.initialize(model=model.base_model, config=config)


def _zero3_config(dtype: torch.dtype, *, of_block: int) -> dict[str, Any]:
    """Return a config that prefetches one block while another computes, like FSDP2.

    `of_block` is the number of parameters in the largest block. DeepSpeed's default keeps 10⁹ parameters gathered.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, has no effect here
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": of_block,
            "stage3_max_live_parameters": 2 * of_block,
            "stage3_max_reuse_distance": of_block,
        },
    }


@contextmanager
def _hidden(model: nn.Module, rest: set[nn.Parameter]) -> Iterator[None]:
    """Hide the modules of `model` that own these parameters within the block of code."""
    own = [
        path
        for path, module in model.named_modules()
        if path and any(parameter in rest for parameter in module.parameters(recurse=False))
    ]
    kept = {path.rpartition(".")[0]: dict(model.get_submodule(path.rpartition(".")[0])._modules) for path in own}
    for path in own:
        parent, _, name = path.rpartition(".")
        del model.get_submodule(parent)._modules[name]
    try:
        yield
    finally:
        for parent, modules in kept.items():
            held = model.get_submodule(parent)._modules
            held.clear()
            held.update(modules)

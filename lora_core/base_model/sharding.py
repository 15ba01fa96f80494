# pyright: basic
"""A base model whose blocks are sharded over the ranks of a trainer, by FSDP2 (`fully_shard` of torch) or ZeRO-3
(DeepSpeed). A rank has the whole of a block only while the block computes. Shards are in device or in host memory.

Embeddings, final norm and head stay whole: the loss reads the head outside any module. Rows are no part of the model.
A block is put together by collectives, so every rank passes through all blocks as often as the others
(lora_core/engine/step.py).
"""

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

Strategy = Literal["replicated", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"]
"""Every rank holds the whole base, or a share of each block by one library or the other, on its device or its host."""
EXACT_PINNING = "pinned_max_round_threshold_mb:1"
"""Of torch's allocator: what is pinned isn't rounded up to a power of two, which may be twice as much."""


def offloads(strategy: Strategy) -> bool:
    """Whether the shares are in the memory of the host."""
    return strategy.endswith("_offload")


def shard(model: PreTrainedModel, strategy: Strategy, ranks: Ranks, *, device: str, dtype: torch.dtype) -> None:
    """Divide the blocks, in place; the rest goes to `device`; all in `dtype`. The weights may be memory-mapped, in any
    dtype: no rank needs more of a block than its share beyond the time when it is divided.

    Raises UnsupportedModel where no blocks are found, ConfigError where the library is missing or there is one rank.
    """
    blocks = find_blocks(model).modules
    if not blocks:
        raise UnsupportedModel(
            f"{type(model).__name__} can't be divided: its blocks were not found.",
            remedy="Train it with the strategy 'replicated', on devices that hold all of it.",
        )
    if ranks.size == 1:
        raise ConfigError(
            f"The strategy {strategy!r} divides a base model among several processes, and there is one.",
            remedy="Give the trainer more devices, or use 'replicated'.",
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
    """Beside what is set. An older torch, which has no such settings, rounds up."""
    settings = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if settings is not None:
        torch._C._accelerator_setAllocatorSettings(",".join(filter(None, (settings(), EXACT_PINNING))))


def _cast(block: nn.Module, dtype: torch.dtype) -> None:
    """Right before it is divided: each rank's host would else hold all blocks, where the dtype isn't the files'."""
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)


def is_whole(weight: Tensor) -> bool:
    """Whether a rank can read the numbers now: not of a block that is divided and doesn't compute."""
    return not isinstance(weight, DTensor) and not (hasattr(weight, "ds_id") and weight.numel() == 0)


def allocated_bytes(weight: Tensor, kind: str) -> int:
    """By this rank in memory of that kind ("cpu", "cuda"), while no block computes."""
    share = weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)
    return share.nbytes if share.device.type == kind else 0


@contextmanager
def with_guests(model: PreTrainedModel, strategy: Strategy) -> Iterator[None]:
    """Within, blocks may hold parameters that nobody has divided, as PEFT puts them there. Without gradients.

    DeepSpeed takes all that a block holds for its own, so its hooks are left out; what it has divided is put together
    by its own means, block by block.
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
    """It replaces a block's parameters: whoever held on to those that were would hold the whole base."""
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
    """A block is one leaf: DeepSpeed then gathers all of it at once, before its forward and before its backward."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    try:
        import deepspeed  # pyright: ignore[reportMissingImports]
        from deepspeed.utils import set_z3_leaf_modules  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "The strategies 'zero3' and 'zero3_offload' need DeepSpeed, which is not installed here.",
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
    """of_block: numbers in the largest block. One computes and the next one is on its way, as FSDP2 has it; by its own
    defaults DeepSpeed keeps a thousand million numbers together."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants one; nothing follows from it
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
    """Within, the modules of `model` that hold these are none of its own."""
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

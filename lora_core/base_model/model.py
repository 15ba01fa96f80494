# pyright: basic
"""The resident base model: described without its weights, or loaded (memory-mapped if possible) and frozen.

A base folder, as lora_core/model_files/import_base.py creates it, contains config.json, safetensors and a tokenizer.
Nothing else is read.
"""

import logging
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from lora_core.base_model.blocks import find_blocks
from lora_core.base_model.identity import base_digest
from lora_core.base_model.loading import (
    AUTO_MODELS,
    built_in_attention,
    load_with_transformers,
    mismatch,
    read_config,
    refuse_quantized,
    refused,
    unpackable,
)
from lora_core.base_model.patching import Attachment, find_linears, target_of
from lora_core.base_model.quantization import Quantization, load_quantized, scale_bytes
from lora_core.base_model.sharding import Strategy, allocated_bytes, allow_unsharded, shard
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.errors import ConfigError, DeviceUnusable, UnreachableSource
from lora_core.kernels.numba_jit import REFUSAL
from lora_core.kernels.selection import Kernels
from lora_core.layers.task_heads import Task, counts_from_padding, fill_placeholder, refuse_unknown_head, task_head_of
from lora_core.losses.chunked_cross_entropy import Head
from lora_core.module_paths import grouped_by_layer
from lora_core.runtime.safetensors_io import read_header

LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class BaseModel:
    """A frozen model in evaluation mode, for causal language modeling or sequence classification.

    The classification head it was loaded with is not used by jobs. An engine attaches itself to the model. `digest`
    identifies the folder (identity.py). It is None for a model without a folder, and such models are not distinguished.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    device: str
    quantization: Quantization = "none"
    task: Task = "causal-lm"
    digest: str | None = None
    strategy: Strategy = "replicated"
    attachment: Attachment | None = field(default=None)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds only a shard of the blocks (sharding.py)."""
        return self.strategy != "replicated"

    @property
    def kernels(self) -> Kernels:
        return Kernels() if self.attachment is None else self.attachment.kernels

    def attach(self, *, batch_invariant: bool) -> Attachment:
        """Attach the engine's patches. If they are attached with another `batch_invariant`, attach them again."""
        if self.attachment is not None and self.attachment.batch_invariant != batch_invariant:
            self.attachment.detach()
            self.attachment = None
        if self.attachment is None:
            self.attachment = Attachment(self.model, batch_invariant=batch_invariant, is_sharded=self.is_sharded)
        return self.attachment

    def linear_names(self) -> tuple[str, ...]:
        """Return the module paths of the linears that an adapter may change."""
        return tuple(find_linears(self.model))

    @property
    def num_bytes(self) -> int:
        """Bytes on this rank's device. For a sharded model its shard, unless that is in host memory."""
        kind = torch.device(self.device).type
        return sum(allocated_bytes(weight, kind) for weight in self.model.parameters()) + scale_bytes(self.model)

    @property
    def gpu_name(self) -> str | None:
        """Return the model of the GPU that holds it; None on a CPU."""
        return None if torch.device(self.device).type == "cpu" else torch.cuda.get_device_name(self.device)

    @property
    def vocab_size(self) -> int:
        if self.task == "causal-lm":
            return self.head().weight_VD.shape[0]
        return cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings

    @property
    def max_positions(self) -> int | None:
        return max_positions(self.model.config)

    def head(self) -> Head:
        """Return the output head, with the scaling and capping of logits that the model family applies."""
        config, output = self.model.config, self.model.get_output_embeddings()
        assert output is not None
        multiplier = float(getattr(config, "logit_scale", None) or 1.0)
        multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)
        return Head(
            weight_VD=cast(torch.Tensor, output.weight),
            bias_V=getattr(output, "bias", None),
            multiplier=multiplier,
            softcap=getattr(config, "final_logit_softcapping", None),
            exact=self.kernels.batch_invariant,
        )

    @contextmanager
    def untouched(self):
        """Restore the model as transformers built it within the block. For passes without gradients."""
        suspended = nullcontext() if self.attachment is None else self.attachment.suspended()
        with suspended, allow_unsharded(self.model, self.strategy):
            yield self.model


def describe_base(base_dir: Path) -> dict[str, Any]:
    """Return facts about a base model as JSON-serializable values, without reading weights. Raises UnsupportedModel."""
    config = read_config(base_dir)
    with torch.device("meta"):
        model = build_model(config)
    shapes: dict[str, list[Any]] = {}
    linears: dict[str, tuple[int, int]] = {}
    for name, linear in find_linears(model).items():
        target = target_of(name, linear)
        linears[name] = target.out_features, target.in_features
        entry = shapes.setdefault(name.rpartition(".")[2], [[target.out_features, target.in_features], 0])
        entry[1] += 1
    return {
        "architecture": type(model).__name__,
        "num_parameters": model.num_parameters(),
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_positions": max_positions(config),
        "linear_shapes": shapes,
        "linear_paths": grouped_by_layer(linears),
        "blocks": _sizes_of_blocks(model),
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
    }


def _sizes_of_blocks(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of blocks, and the parameters in all of them and in the largest, for sharding estimates."""
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in find_blocks(model).modules]
    return {"count": len(sizes), "num_parameters": sum(sizes), "largest_parameters": max(sizes, default=0)}


def max_positions(config: Any) -> int | None:
    found = getattr(config, "max_position_embeddings", None)
    return found - config.pad_token_id - 1 if found is not None and counts_from_padding(config) else found


Dtype = Literal["bfloat16", "float32"]


def load_base(
    base_dir: Path | str,
    *,
    dtype: Dtype,
    device: str,
    quantization: Quantization = "none",
    task: Task = "causal-lm",
    strategy: Strategy = "replicated",
    ranks: Ranks = ALONE,
) -> BaseModel:
    """Load frozen weights. On a CPU, in the dtype of the files, they stay memory-mapped and shared between processes.

    Args:
        dtype: Dtype in which the weights are held.
        device: Torch device, such as "cpu" or "cuda:0".
        quantization: Quantize while loading. Each process then has its own copy.
        task: Selects the head. For classification each job has its own, and a head in the files is ignored.
        strategy: How `ranks` hold the model. Every rank calls this function.

    Raises:
        UnsupportedModel: The model family can't be packed.
        UnreachableSource: The folder does not exist.
        UnsafeFile: A tensor file exceeds a limit.
        ConfigError: An argument has an unknown value, or Numba can't be imported on a CPU.
        DeviceUnusable: PyTorch can't use the GPU.
    """
    for name, value, known in (
        ("dtype", dtype, Dtype),
        ("quantization", quantization, Quantization),
        ("task", task, Task),
        ("strategy", strategy, Strategy),
    ):
        _require_known(name, value, get_args(known))
    if device.startswith("cuda"):
        _require_gpu(device)
    base_dir = Path(base_dir)
    _require_cpu_kernels(device)
    _require_folder(base_dir)
    config = read_config(base_dir, task)
    if quantization != "none" and task != "causal-lm":
        raise refused("quantized base models can't be trained for classification", remedy="Set quantization to 'none'.")
    is_sharded = strategy != "replicated"
    if is_sharded and (quantization != "none" or task != "causal-lm"):
        raise refused(
            f"the strategy {strategy!r} supports only causal language models without quantization",
            remedy="Use the strategy 'replicated'.",
        )
    torch_dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    paths = sorted(base_dir.glob("*.safetensors"))
    for path in paths:
        read_header(path)
    empty = _build_empty(config, torch_dtype, task)
    if quantization == "none":
        model = _load_plain(empty, base_dir, paths, device=None if is_sharded else device, task=task)
    else:
        model = load_quantized(base_dir, quantization=quantization, dtype=torch_dtype, device=device)
    model.requires_grad_(False).eval()
    if is_sharded:
        shard(model, strategy, ranks, device=device, dtype=torch_dtype)
    return BaseModel(
        model=model,
        dtype=torch_dtype,
        device=device,
        quantization=quantization,
        task=task,
        digest=base_digest(base_dir, paths),
        strategy=strategy,
    )


def _require_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}, which is not supported.", remedy=f"Use one of: {', '.join(known)}.")


def _require_gpu(device: str) -> None:
    """Raise DeviceUnusable with torch's reason if CUDA finds no GPU, for example because the driver is too old."""
    if torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
        reason = "it finds no GPU"
    except (AssertionError, RuntimeError) as error:  # AssertionError: a build without CUDA
        reason = str(error).strip().partition("\n")[0].rstrip(".")
    raise DeviceUnusable(
        f"PyTorch {torch.__version__} can't use {device}: {reason}.",
        remedy="Check the driver with nvidia-smi, install a build of PyTorch for its CUDA version, or use the CPU.",
    )


def _require_cpu_kernels(device: str) -> None:
    """Refuse to load on a CPU without Numba. The results would have other bits, and take many times as long."""
    if REFUSAL is None:
        return
    if torch.device(device).type == "cpu":
        raise ConfigError(
            f"No base model can be loaded on a CPU, because Numba can't be imported ({REFUSAL}).",
            remedy="Install a version of Numba that supports the installed NumPy: pip install --upgrade numba",
        )
    LOGGER.warning("Numba can't be imported (%s). The GPU does not need it, but exports of merged models do.", REFUSAL)


def _require_folder(base_dir: Path) -> None:
    if base_dir.is_file():
        remedy = "Convert it to a folder with lora_core.model_files.import_base.import_base, and use that folder."
        raise UnreachableSource(f"The base model {str(base_dir)!r} is a file, not a folder.", remedy=remedy)
    if not base_dir.is_dir():
        remedy = "Use a folder with config.json and safetensors files. import_base creates one from a Hub repository."
        raise UnreachableSource(f"The folder {str(base_dir)!r} does not exist.", remedy=remedy)


def _load_plain(
    empty: PreTrainedModel, base_dir: Path, paths: list[Path], *, device: str | None, task: Task
) -> PreTrainedModel:
    """Load safetensors. With `device` None, parameters stay memory-mapped in the files' dtype, for `shard` to load."""
    weights: dict[str, torch.Tensor] = {}
    for path in paths:
        weights |= load_file(path)  # views of a private memory map
    model, own = empty, empty.state_dict()
    if task != "causal-lm":
        fill_placeholder(model)
        own = model.state_dict()
        heads = {name: weight for name, weight in own.items() if _is_of_head(model, name)}
        weights = {name: weight for name, weight in weights.items() if name in own} | heads
        fits = weights.keys() == own.keys()
    else:
        fits = weights.keys() <= own.keys()
    if fits:
        mapped = set[str]() if device else {name for name, _ in empty.named_parameters(remove_duplicate=False)}
        for name in weights.keys() - mapped:
            weights[name] = weights[name].to(device, empty.dtype)
        _assign(model, weights)
    else:  # transformers renames outdated keys, which needs a copy
        weights.clear()
        model = load_with_transformers(base_dir, dtype=model.dtype, task=task)
        if task != "causal-lm":
            fill_placeholder(model)
    if device is not None:
        nn.Module.to(model, device)
    return model


def _is_of_head(model: PreTrainedModel, name: str) -> bool:
    head = task_head_of(model)
    return head is not None and name.startswith(f"{head.path}.")


def build_model(config: Any, task: Task = "causal-lm") -> PreTrainedModel:
    """Build an unattached model of `config` on the current default device. Raises UnsupportedModel if unpackable."""
    refuse_quantized(config)
    try:
        attention = built_in_attention(config, task)
        model = AUTO_MODELS[task].from_config(config, trust_remote_code=False, attn_implementation=attention)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise refused(f"no model can be built from its config.json ({type(error).__name__}: {error})") from error
    if task != "causal-lm":
        refuse_unknown_head(model)
    refuse_unpackable_model(model)
    return model


def refuse_unpackable_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel for properties of the modules that the config does not reveal."""
    if not find_linears(model):
        raise unpackable(model.config, "has no linear layer that an adapter could change")
    if any(parameter.ndim > 2 for parameter in model.parameters()):
        raise unpackable(model.config, "has weights that aren't plain matrices (experts or convolutions)")
    if not model._can_set_attn_implementation():
        raise unpackable(model.config, "has its own attention, which can't be packed")


def _build_empty(config: Any, dtype: torch.dtype, task: Task) -> PreTrainedModel:
    """Build the model with parameters on the meta device. Buffers (rotary tables) are real: no file contains them."""
    from accelerate import init_empty_weights

    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        return build_model(config, task)


def _assign(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Assign the weights, whose names are those of the model. Raises UnsupportedModel if one is missing."""
    try:
        model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise mismatch(str(error)) from error
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise mismatch(f"{missing[0]} is missing")

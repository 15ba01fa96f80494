# pyright: basic
"""The resident base model: described without its weights, or loaded memory-mapped and frozen.

A base directory is what lora_core/model_files/import_base.py makes: config.json, safetensors, a tokenizer. Nothing else
is read.
"""

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
from lora_core.base_model.sharding import Strategy, allocated_bytes, shard, with_guests
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.errors import ConfigError, UnreachableSource
from lora_core.kernels.selection import Kernels
from lora_core.layers.task_heads import Task, counts_from_padding, fill_placeholder, refuse_unknown_head, task_head_of
from lora_core.losses.chunked_cross_entropy import Head
from lora_core.module_paths import grouped_by_layer
from lora_core.runtime.safetensors_io import read_header


@dataclass(kw_only=True, slots=True)
class BaseModel:
    """A frozen model in evaluation mode: of causal language, or to classify sequences, with a head that no job
    uses. An engine attaches itself to it. `digest` tells the folder that it was loaded from (identity.py); a model
    that is from none has none, and one of those is not told from another."""

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
        """Whether this rank holds a share of the blocks (sharding.py)."""
        return self.strategy != "replicated"

    @property
    def kernels(self) -> Kernels:
        return Kernels() if self.attachment is None else self.attachment.kernels

    def attach(self, *, batch_invariant: bool) -> Attachment:
        """Attach an engine's means; anew where those that are attached give other products."""
        if self.attachment is not None and self.attachment.batch_invariant != batch_invariant:
            self.attachment.detach()
            self.attachment = None
        if self.attachment is None:
            self.attachment = Attachment(self.model, batch_invariant=batch_invariant, is_sharded=self.is_sharded)
        return self.attachment

    def linear_names(self) -> tuple[str, ...]:
        """Module paths of the linears that an adapter may change."""
        return tuple(find_linears(self.model))

    @property
    def num_bytes(self) -> int:
        """That this rank holds on its device: of a divided base its share, unless that is in the host's memory."""
        kind = torch.device(self.device).type
        return sum(allocated_bytes(weight, kind) for weight in self.model.parameters()) + scale_bytes(self.model)

    @property
    def vocab_size(self) -> int:
        if self.task == "causal-lm":
            return self.head().weight_VD.shape[0]
        return cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings

    @property
    def max_positions(self) -> int | None:
        return max_positions(self.model.config)

    def head(self) -> Head:
        """The output head with the scaling and capping that the model's family applies to logits."""
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
        """The model as transformers built it, whether or not an engine is attached; for passes without gradients."""
        suspended = nullcontext() if self.attachment is None else self.attachment.suspended()
        with suspended, with_guests(self.model, self.strategy):
            yield self.model


def describe_base(base_dir: Path) -> dict[str, Any]:
    """JSON-able facts from config.json and the meta device; no weights are read. Raises UnsupportedModel."""
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
    """How many blocks there are, and the numbers in all of them and in the largest: what ranks may divide."""
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
    """Load frozen weights; on a CPU, in the file's own dtype, they stay memory-mapped and shared.

    Quantized ones are made while loading, so each process holds its own. Raises UnsupportedModel for a family
    that can't be packed, UnreachableSource where there is no such folder, UnsafeFile for a tensor file over the limits,
    ConfigError for an unknown dtype, quantization or task, and for a GPU that isn't there. `task` chooses the head: for
    classification each job brings its own, and what the files hold of one isn't used. `strategy`: how `ranks` hold it;
    each of them calls this.
    """
    for name, value, known in (
        ("dtype", dtype, Dtype),
        ("quantization", quantization, Quantization),
        ("task", task, Task),
        ("strategy", strategy, Strategy),
    ):
        _require_known(name, value, get_args(known))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device!r}, and this torch ({torch.__version__}) finds no GPU.",
            remedy="Install a build of torch for CUDA, or give 'cpu'.",
        )
    base_dir = Path(base_dir)
    _require_folder(base_dir)
    config = read_config(base_dir, task)
    if quantization != "none" and task != "causal-lm":
        raise refused("a quantized base can't be trained for classification yet")
    is_sharded = strategy != "replicated"
    if is_sharded and (quantization != "none" or task != "causal-lm"):
        raise refused(f"by the strategy {strategy!r} only plain weights of causal language are divided yet")
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
        raise ConfigError(f"{name} is {value!r}.", remedy=f"{name} must be one of {', '.join(known)}.")


def _require_folder(base_dir: Path) -> None:
    if base_dir.is_file():
        remedy = "Make a folder of it with lora_core.model_files.import_base.import_base, and give that."
        raise UnreachableSource(f"The base model {str(base_dir)!r} is a file, not a folder.", remedy=remedy)
    if not base_dir.is_dir():
        remedy = "Give a folder with config.json and safetensors; import_base makes one of a repository of the hub."
        raise UnreachableSource(f"There is no folder {str(base_dir)!r}.", remedy=remedy)


def _load_plain(
    empty: PreTrainedModel, base_dir: Path, paths: list[Path], *, device: str | None, task: Task
) -> PreTrainedModel:
    """device: None where the parameters are to stay mapped, in the file's own dtype; `shard` takes them from there."""
    weights: dict[str, torch.Tensor] = {}
    for path in paths:
        weights |= load_file(path)  # views of a private memory map
    mapped = set[str]() if device is not None else {name for name, _ in empty.named_parameters(remove_duplicate=False)}
    weights = {name: weight if name in mapped else weight.to(device, empty.dtype) for name, weight in weights.items()}
    model, fits = empty, True
    if task != "causal-lm":
        fill_placeholder(model)
        own = model.state_dict()
        heads = {name: weight for name, weight in own.items() if _is_of_head(model, name)}
        weights = {name: weight for name, weight in weights.items() if name in own} | heads
        fits = weights.keys() == own.keys()
    if not fits or not _assign(model, weights):
        model = load_with_transformers(base_dir, dtype=model.dtype, task=task)  # older names in the file: a copy
        if task != "causal-lm":
            fill_placeholder(model)
    if device is not None:
        nn.Module.to(model, device)
    return model


def _is_of_head(model: PreTrainedModel, name: str) -> bool:
    head = task_head_of(model)
    return head is not None and name.startswith(f"{head.path}.")


def build_model(config: Any, task: Task = "causal-lm") -> PreTrainedModel:
    """An unattached model of `config`, on the current default device. Refuses what can't be packed."""
    refuse_quantized(config)
    try:
        attention = built_in_attention(config, task)
        model = AUTO_MODELS[task].from_config(config, trust_remote_code=False, attn_implementation=attention)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise refused(f"no model can be made by its config.json ({type(error).__name__}: {error})") from error
    if task != "causal-lm":
        refuse_unknown_head(model)
    refuse_unpackable_model(model)
    return model


def refuse_unpackable_model(model: PreTrainedModel) -> None:
    """What the config doesn't tell, but the modules do."""
    if not find_linears(model):
        raise unpackable(model.config, "has no linear layer that an adapter could go on")
    if any(parameter.ndim > 2 for parameter in model.parameters()):
        raise unpackable(model.config, "has weights that aren't plain matrices (experts or convolutions)")
    if not model._can_set_attn_implementation():
        raise unpackable(model.config, "has its own attention, which can't be packed")


def _build_empty(config: Any, dtype: torch.dtype, task: Task) -> PreTrainedModel:
    """Parameters on the meta device; buffers (rotary tables) real, for no file holds them."""
    from accelerate import init_empty_weights

    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        return build_model(config, task)


def _assign(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> bool:
    """Use the mapped weights in place; False where the file's names aren't the model's."""
    if weights.keys() - model.state_dict().keys():
        return False
    try:
        model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise mismatch(str(error)) from error
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise mismatch(f"{missing[0]} is missing")
    return True

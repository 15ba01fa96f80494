# pyright: basic
"""Patches the modules of a base model so that they compute packs, and removes the patches completely.

Each linear and block gets its own `forward` on the instance. So does each module that rms_norm.py, rotary.py,
longrope.py, swiglu.py or residual_block.py (in lora_core/layers) recognizes. No module is replaced, and no name or
parameter changes. Outside a running pack each computes exactly what it computed before.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_core.adapter.flat_adapter import AdaptedModule
from lora_core.adapter.modules_to_save import path_of
from lora_core.base_model.blocks import find_blocks
from lora_core.base_model.sharding import is_whole
from lora_core.config import ALL_LINEAR, LoraConfig
from lora_core.errors import NoTargets
from lora_core.kernels.batch_invariant import ExactProducts, own_forward
from lora_core.kernels.selection import AttentionHeads, Kernels, choose_kernels, prepare_device
from lora_core.layers.activation_checkpointing import blocks_of, checkpointed
from lora_core.layers.attention import packed
from lora_core.layers.embeddings import forward_embedding, forward_embedding_watched
from lora_core.layers.fused_projections import Siblings, find_siblings, forward_siblings, taken_from_ahead
from lora_core.layers.longrope import rotations_by_length
from lora_core.layers.lora_linear import PackedDelta, PackedLinear, PlainWeight
from lora_core.layers.module_matching import is_norm_or_gated
from lora_core.layers.recomputed_inputs import origin_of
from lora_core.layers.residual_block import faster_blocks, has_norms_first
from lora_core.layers.rms_norm import faster_norms
from lora_core.layers.rotary import faster_rotations
from lora_core.layers.swiglu import faster_mlps
from lora_core.layers.task_heads import task_head_of
from lora_core.layers.tiled_lora import SegmentedLora
from lora_core.module_paths import PatternTooSlow, end_pattern, layer_of, matches, matches_pattern
from lora_core.packing.packed_batch import current_kernels, current_pack

LOGGER = logging.getLogger(__name__)


def find_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linears that an adapter may change, by module path: all except the output or task head, as in PEFT."""
    head, task_head = model.get_output_embeddings(), task_head_of(model)
    in_head = "" if task_head is None else f"{task_head.path}."
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and not (in_head and f"{name}.".startswith(in_head))
    }


def target_of(name: str, linear: nn.Module) -> AdaptedModule:
    if isinstance(linear, Conv1D):
        return AdaptedModule(name=name, in_features=linear.nx, out_features=linear.nf)
    assert isinstance(linear, nn.Linear)
    return AdaptedModule(name=name, in_features=linear.in_features, out_features=linear.out_features)


def choose_targets(linears: dict[str, nn.Module], lora: LoraConfig) -> tuple[AdaptedModule, ...]:
    """Return the linears that `lora` selects, in the model's order. Raises NoTargets if a name matches nothing."""
    try:
        wanted = _in_layers(_wanted(linears, lora), lora.layers_to_transform)
        for field, pairs in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
            for key, _ in pairs:
                if not any(matches_pattern(path, end_pattern(key)) for path in wanted):
                    raise _unmatched(f"The key {key!r} in lora.{field} does not match any targeted layer.", linears)
    except PatternTooSlow as error:
        raise NoTargets(
            f"The regular expression {str(error)!r} takes too long to match a module path.",
            remedy="Remove nested repetitions such as (a+)+, or use module names instead.",
        ) from error
    return tuple(target_of(path, linears[path]) for path in wanted)


def _wanted(linears: dict[str, nn.Module], lora: LoraConfig) -> list[str]:
    wanted, pattern = lora.target_modules, lora.target_pattern
    if wanted == ALL_LINEAR:
        return list(linears)
    if pattern is not None:
        found = [path for path in linears if matches_pattern(path, pattern)]
        if not found:
            raise _unmatched(
                f"The pattern {pattern!r} in lora.target_modules does not match any linear layer of this base model.",
                linears,
            )
        return found
    suffixes = (wanted,) if isinstance(wanted, str) else wanted
    for suffix in suffixes:
        if not any(matches(path, suffix) for path in linears):
            sentence = f"{suffix!r} in lora.target_modules does not match any linear layer of this base model."
            raise _unmatched(sentence, linears)
    return [path for path in linears if any(matches(path, suffix) for suffix in suffixes)]


def _in_layers(paths: list[str], layers: tuple[int, ...] | None) -> list[str]:
    if layers is None:
        return paths
    existing = {layer_of(path) for path in paths}
    for layer in layers:
        if layer not in existing:
            numbers = sorted(layer for layer in existing if layer is not None)
            raise NoTargets(
                f"lora.layers_to_transform contains {layer}, but block {layer} has no targeted linear layer.",
                remedy=f"Use these block numbers: {', '.join(map(str, numbers))}. Or omit lora.layers_to_transform."
                if numbers
                else "Omit lora.layers_to_transform: the targeted layers are not in numbered blocks.",
            )
    return [path for path in paths if layer_of(path) in layers]


def _unmatched(sentence: str, linears: dict[str, nn.Module]) -> NoTargets:
    existing = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
    return NoTargets(sentence, remedy=f"Use 'all-linear', or names from this list: {existing}.")


class Attachment:
    """The patches of one model.

    `leaf` is a scalar that requires a gradient, which makes autograd visit adapted linears. `kernels` overrides the
    choice for the model's device and dtype. `batch_invariant` makes results independent of packmates on a CPU.
    `is_compiled` is whether compiled kernels compute all norms and gated MLPs, and a norm comes before each attention
    and MLP. The backward on a GPU then recomputes what these norms and activations return.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kernels: Kernels | None = None,
        *,
        batch_invariant: bool = True,
        is_sharded: bool = False,
    ) -> None:
        """With `is_sharded`, a weight is only read by its own module while that computes."""
        self.model = model
        self.is_sharded = is_sharded
        self.batch_invariant = batch_invariant
        self.linears = find_linears(model)
        prepare_device(model.device)
        self.kernels = kernels or replace(
            choose_kernels(model.device, model.dtype, attention_heads(model.config)),
            batch_invariant=ExactProducts() if batch_invariant and model.device.type == "cpu" else None,
        )
        for reason in self.kernels.reasons:
            LOGGER.warning("%s", reason)
        self.blocks = find_blocks(model)
        self._siblings = {} if is_sharded else find_siblings(self.linears)
        groups = [siblings.modules for siblings in self._siblings.values()]
        self.segment_op = SegmentedLora(self.kernels.lora, self.linears, groups)
        self.leaf = torch.zeros((), device=model.device, requires_grad=True)
        self._parts = [*_faster_parts(model, self.kernels, is_sharded=is_sharded), *rotations_by_length(model)]
        replaced = {id(module) for module, _ in self._parts}
        left = [part for part in model.modules() if is_norm_or_gated(part) and id(part) not in replaced]
        self.is_compiled = not left and all(map(has_norms_first, self.blocks.modules))
        if self.kernels.elementwise == "compiled" and not is_sharded and model.device.type == "cuda":
            _report_left([*left, *(block for block in self.blocks.modules if id(block) not in replaced)])
        self._blocks = blocks_of(model)
        self._attention = model.config._attn_implementation or "eager"
        self._attach()

    def _attach(self) -> None:
        packed.register()
        self.model.set_attn_implementation(packed.NAME)
        for name, linear in self.linears.items():
            linear.forward = partial(forward_linear, linear, name, self.leaf, self.segment_op)
        for name, siblings in self._siblings.items():
            linear = self.linears[name]
            linear.forward = partial(forward_first, siblings, linear, self.leaf, self.segment_op)
        for module, forward in self._parts:
            module.forward = forward
        for block in self._blocks:
            block.forward = partial(checkpointed, block.forward)
        pooler = getattr(self.model.base_model, "pooler", None)
        if pooler is not None:
            pooler.forward = partial(forward_pooler, pooler)
        embedding = self.model.get_input_embeddings()
        forward = forward_embedding_watched if self.is_sharded else forward_embedding
        embedding.forward = partial(forward, cast(nn.Embedding, embedding), path_of(self.model, embedding), self.leaf)

    def detach(self) -> None:
        patched = [*self.linears.values(), self.model.get_input_embeddings(), *(module for module, _ in self._parts)]
        patched += self._blocks
        pooler = getattr(self.model.base_model, "pooler", None)
        for module in dict.fromkeys(patched if pooler is None else [*patched, pooler]):
            del module.forward
        self.model.set_attn_implementation(self._attention)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Remove the patches within the block, for another library to use the model."""
        self.detach()
        try:
            yield
        finally:
            self._attach()


def attention_heads(config: PreTrainedConfig) -> AttentionHeads | None:
    """Return the heads of a model. None if its configuration doesn't describe them."""
    text = config.get_text_config()
    size, num_heads = getattr(text, "head_dim", None), getattr(text, "num_attention_heads", None)
    if size is None and num_heads:
        size = text.hidden_size // num_heads
    is_capped = getattr(text, "attn_logit_softcapping", None) is not None
    return None if size is None else AttentionHeads(size=size, is_capped=is_capped)


def _faster_parts(
    model: PreTrainedModel, kernels: Kernels, *, is_sharded: bool
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return faster forwards of norms, gated MLPs, whole blocks and rotations on this device.

    A block comes after its parts. In a sharded model only rotations are replaced, because they read no weight.
    """
    if kernels.elementwise == "eager" and model.device.type != "cpu":
        return []
    rotations = faster_rotations(model)
    if is_sharded:
        return rotations
    norms = faster_norms(model)
    return [*norms, *faster_mlps(model), *faster_blocks(model, [norm for norm, _ in norms]), *rotations]


def _report_left(modules: Sequence[nn.Module]) -> None:
    """Log the modules for which no kernel of the GPU gives the same numbers."""
    counts = Counter(type(module).__name__ for module in modules)
    if counts:
        names = ", ".join(f"{number} {name}" for name, number in counts.items())
        LOGGER.warning("%s run operation by operation: no kernel gives the same numbers", names)


def forward_linear(linear: nn.Module, name: str, leaf: Tensor, segment_op: SegmentedLora, x: Tensor) -> Tensor:
    """Map x [..., D] to [..., O] with the plain linear, or inside a pack also with the adapters."""
    pack = current_pack()
    if pack is None:
        return type(linear).forward(linear, x)
    ahead = taken_from_ahead(name, x)
    if ahead is not None:
        return ahead
    x_TD, origin = x.reshape(-1, x.shape[-1]), origin_of(x)
    share = segment_op.divide((name,), pack, x_TD.device)
    (pieces,) = share.pieces
    plain = plain_weight(linear)
    if plain is not None:
        y_TO = PackedLinear.apply(x_TD, None if share.is_empty else leaf, plain, pieces, share.runs, origin)
    else:
        y_TO = own_forward(linear, x_TD, target_of(name, linear).out_features, current_kernels().batch_invariant)
        if not share.is_empty:
            y_TO = PackedDelta.apply(y_TO, x_TD, leaf, pieces, share.runs, origin)
    return y_TO.view(*x.shape[:-1], -1)


def forward_first(siblings: Siblings, linear: nn.Module, leaf: Tensor, segment_op: SegmentedLora, x: Tensor) -> Tensor:
    """Forward of the first sibling linear, which computes the other siblings with it inside a pack."""
    pack = current_pack()
    if pack is None:
        return type(linear).forward(linear, x)
    return forward_siblings(siblings, pack, leaf, segment_op, x)


def forward_pooler(pooler: nn.Module, hidden: Tensor) -> Tensor | None:
    """Skip the pooler in the pass over tokens, where it would only see the first sequence.

    lora_core/forward/classification.py calls it afterwards.
    """
    pack = current_pack()
    return type(pooler).forward(pooler, hidden) if pack is None or pack.is_pooled else None


def frozen_weights(
    linears: dict[str, nn.Module], targets: tuple[AdaptedModule, ...], lora: LoraConfig
) -> dict[str, Tensor] | None:
    """Return the weight [O, D] of each target by name, without copying, or None if `lora` does not need them.

    Raises NoTargets if a weight can't be read, or is too small for the rank of a decomposition.
    """
    if not (lora.use_dora or lora.subtracts_start):
        return None
    field = "use_dora" if lora.use_dora else f"init_lora_weights={lora.init_lora_weights}"
    weights: dict[str, Tensor] = {}
    for target in targets:
        plain = plain_weight(linears[target.name])
        if plain is None:
            raise NoTargets(
                f"lora.{field} needs the weights of {target.name}, but the base model is quantized or sharded.",
                remedy=f"Remove lora.{field}, or train on the base model without quantization or sharding.",
            )
        if lora.subtracts_start and lora.rank_of(target.name) > min(plain.weight_OD.shape):
            raise NoTargets(
                f"lora.{field} does not support rank {lora.rank_of(target.name)} for {target.name} "
                f"({target.out_features} by {target.in_features}): the maximum is the smaller dimension.",
                remedy="Lower lora.rank, or set a lower rank for this layer in lora.rank_pattern.",
            )
        weights[target.name] = plain.weight_OD
    return weights


def plain_weight(linear: nn.Module) -> PlainWeight | None:
    """Return the weight for a GEMM, or None.

    None for a quantized linear, which has a forward of its own, and in a sharded block that is not computing.
    """
    weight = linear.weight
    if not isinstance(weight, Tensor) or not is_whole(weight):
        return None
    if type(linear) is nn.Linear:
        return PlainWeight(weight_OD=linear.weight, bias_O=linear.bias)
    if type(linear) is Conv1D:
        return PlainWeight(weight_OD=linear.weight.T, bias_O=linear.bias)
    return None

# pyright: basic
"""Model families that can be written as GGUF: their names in llama.cpp, hyperparameters, tensor names and row order."""

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_core.errors import UnsupportedModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""The architecture in llama.cpp, by `model_type` of config.json. Mistral has the operations of Llama."""
ROTARY_KINDS = ("default", "linear", "llama3")
PERMUTED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""Projections whose rows llama.cpp stores in another order for Llama models, and the field with the number of heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Names and row order of a model's tensors in llama.cpp."""

    config: Any
    kind: gguf.MODEL_ARCH

    @property
    def name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.kind]

    @property
    def has_tied_head(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def tensor_name(self, path: str) -> str:
        """Return llama.cpp's name of a tensor such as `model.layers.0.mlp.up_proj.weight`. Raises UnsupportedModel."""
        names = gguf.get_tensor_name_map(self.kind, self.config.num_hidden_layers)
        found = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModel(
                f"The tensor {path} of a model of type {self.config.model_type!r} has no name in GGUF.",
                remedy="Use the format 'merged'.",
            )
        return found

    def to_gguf(self, path: str, rows: Tensor) -> Tensor:
        """Return the rows of a weight, a bias or a LoRA B matrix in llama.cpp's order.

        llama.cpp rotates neighboring pairs of rows of a head for Llama, but transformers rotates its two halves.
        """
        num_heads = self._permuted_heads(path)
        return rows if num_heads is None else halves_to_pairs(rows, num_heads)

    def from_gguf(self, path: str, rows: Tensor) -> Tensor:
        """Return rows in the order of transformers: the inverse of `to_gguf`."""
        num_heads = self._permuted_heads(path)
        return rows if num_heads is None else pairs_to_halves(rows, num_heads)

    def _permuted_heads(self, path: str) -> int | None:
        if self.kind is not gguf.MODEL_ARCH.LLAMA:
            return None
        field = next((field for name, field in PERMUTED.items() if f".{name}" in path), None)
        return None if field is None else int(getattr(self.config, field))

    def add_hyperparameters(self, writer: GGUFWriter) -> None:
        config, rope = self.config, self.config.rope_parameters
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(_context_length(config))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
        writer.add_rope_dimension_count(head_dim(config))
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])

    def rotary_factors(self) -> Tensor | None:
        """Return fp32 [head_dim / 2], by which llama.cpp divides the rotary frequencies; None if they are not
        scaled, or scaled linearly, which the metadata states."""
        if self.config.rope_parameters["rope_type"] != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        return plain_frequencies(self.config) / scaled.float()


def architecture_of(config: Any) -> Architecture:
    """Return the architecture. Raises UnsupportedModel, which lists the supported model types."""
    kind = ARCHITECTURES.get(config.model_type)
    if kind is None:
        raise _unsupported(config, "this type can't be written")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise _unsupported(config, "its linear layers have biases")
    rotary = config.rope_parameters.get("rope_type")
    if rotary not in ROTARY_KINDS:
        raise _unsupported(config, f"it scales its rotary embeddings by {rotary!r}")
    if config.rope_parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported(config, "it rotates only a part of each head")
    if config.hidden_act != "silu":
        raise _unsupported(config, f"its activation is {config.hidden_act!r}")
    return Architecture(config=config, kind=kind)


def halves_to_pairs(rows: Tensor, num_heads: int) -> Tensor:
    """Return the rows [num_heads * head_dim, ...] of a projection in the order that llama.cpp rotates for Llama."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def pairs_to_halves(rows: Tensor, num_heads: int) -> Tensor:
    """Return such rows in the order of transformers: the inverse of `halves_to_pairs`."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def plain_frequencies(config: Any) -> Tensor:
    """Return fp32 [head_dim / 2]: the rotary frequencies without scaling."""
    exponents = torch.arange(0, head_dim(config), 2, dtype=torch.float32) / head_dim(config)
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents


def _context_length(config: Any) -> int:
    """Return the number of positions up to which full attention, which llama.cpp computes for these families, is
    exact: a sliding window has no effect in shorter texts."""
    window = getattr(config, "sliding_window", None)
    positions = int(config.max_position_embeddings)
    return positions if window is None else min(positions, int(window))


def _unsupported(config: Any, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"A base model of type {config.model_type!r} can't be exported as GGUF: {reason}.",
        remedy="Use the format 'merged', and convert its folder with llama.cpp: `python convert_hf_to_gguf.py FOLDER "
        f"--outtype q8_0`. Lorry itself writes base models of the type {', '.join(ARCHITECTURES)} with rotary "
        f"embeddings of the kind {', '.join(ROTARY_KINDS)}.",
    )

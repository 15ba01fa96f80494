# pyright: basic
"""Compares a GGUF file that llama.cpp's converter wrote with the model folder that it was converted from.

The file may be of any architecture, so llama.cpp's logits can't be computed here. Instead, the file must contain the
weights of the folder and no others, rounded to the format, under llama.cpp's names and in its layout.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, dequantize
from gguf.quants import quantize
from torch import Tensor
from transformers import AutoTokenizer

from lora_core.base_model.model import load_base
from lora_core.errors import BadAdapter
from lora_core.gguf_format.architecture import PERMUTED, halves_to_pairs, pairs_to_halves
from lora_core.gguf_format.tokenizer import SPACE
from lora_core.gguf_format.verify import GgufReport, compute_logits, draw_ids

Layout = Callable[[Tensor], Tensor]
NUM_NAMED = 3
"""Tensors that a text names at most."""
EPSILON = float(np.finfo(np.float32).eps)
ROTATED_IN_PAIRS = ("llama", "granite", "smollm3", "arcee")
"""Architectures of llama.cpp that rotate neighboring pairs of rows, where transformers rotates two halves."""
NORMS_FROM_ONE = ("gemma", "gemma2", "gemma3")
"""Architectures whose norms multiply by 1 + w. llama.cpp stores the sum."""
MATRICES_IN_OUT = {"gpt2": (".c_attn.weight", ".c_fc.weight", ".c_proj.weight")}
"""Weights that transformers stores as [in, out]."""
EPSILON_FIELDS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
}
"""llama.cpp's key for the epsilon of norms, by its field in config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedReport(GgufReport):
    """`explanation` states what was compared. The logits are those of the merged model with the weights of the file, so
    rounding explains all of their difference."""

    explanation: str


def verify_converted(model_dir: Path, path: Path) -> ConvertedReport:
    """Compare `path` with the merged model in `model_dir`. Raises BadAdapter."""
    source = load_base(model_dir, dtype="float32", device="cpu")
    ids = draw_ids(source)
    adapted = compute_logits(source.model, ids)
    file = GGUFReader(path)
    config = source.model.config.get_text_config()
    metadata = _compare_metadata(file, config, path)
    _compare_tokens(file, model_dir, config.vocab_size, path)
    _take_weights(source.model, file, config, path)
    difference = float((compute_logits(source.model, ids) - adapted).abs().max())
    if not difference < float("inf"):
        raise _bad(path, "its values are beyond the range of f16")
    text = (
        f"llama.cpp's converter wrote this file. Its {len(file.tensors)} tensors are the weights of the merged model, "
        f"rounded to the format. Rounding changes the logits by at most {difference:.3g}. "
        f"The tokens, {', '.join(metadata)} are those of the base model. Other metadata was not "
        "compared, and Lorry did not run the file."
    )
    measured = GgufReport(max_abs_diff=difference, tolerance=difference, max_abs_logit=float(adapted.abs().max()))
    return ConvertedReport(**asdict(measured), explanation=text)


def _take_weights(model: torch.nn.Module, file: GGUFReader, config: Any, path: Path) -> None:
    """Replace each weight by that of the file. Raises BadAdapter unless both have the same weights."""
    architecture = _field(file, "general.architecture")
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
    if kind is None:
        raise _bad(path, f"the package gguf of this worker does not know the architecture {architecture!r}")
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    other: list[str] = []
    for name, parameter in model.named_parameters():
        tensor = tensors.pop(names.get_name(name, try_suffixes=(".weight", ".bias")) or "", None)
        to_file, from_file = _layout(architecture, name, config)
        values = to_file(parameter.data)
        if (
            tensor is None
            or values.shape != tuple(reversed(tensor.shape.tolist()))
            or not np.array_equal(quantize(values.numpy(), tensor.tensor_type), tensor.data)
        ):
            other.append(name)
        else:
            parameter.data = from_file(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))
    if other:
        raise _bad(path, f"{_listed(other)} can't be found in it with the values of the merged model")
    if tensors:
        raise _bad(path, f"the merged model has no weight for its tensors {_listed(list(tensors))}")


def _layout(architecture: str, name: str, config: Any) -> tuple[Layout, Layout]:
    """Return how llama.cpp stores a weight of transformers, and the inverse."""
    if architecture in NORMS_FROM_ONE and name.endswith("norm.weight"):
        return lambda rows: rows + 1, lambda rows: rows - 1
    if name.endswith(MATRICES_IN_OUT.get(architecture, ())):
        return lambda rows: rows.T.contiguous(), lambda rows: rows.T.contiguous()
    heads = next((field for projection, field in PERMUTED.items() if f".{projection}." in name), None)
    if architecture in ROTATED_IN_PAIRS and heads is not None:
        num_heads = int(getattr(config, heads))
        return partial(halves_to_pairs, num_heads=num_heads), partial(pairs_to_halves, num_heads=num_heads)
    return lambda rows: rows, lambda rows: rows


def _compare_metadata(file: GGUFReader, config: Any, path: Path) -> list[str]:
    """Compare the numbers on which a model's outputs depend, and that its tensors do not show. Returns their keys.
    Raises BadAdapter."""
    prefix, rope = _field(file, "general.architecture"), getattr(config, "rope_parameters", None) or {}
    num_heads = config.num_attention_heads
    expected = {
        "attention.head_count": num_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or num_heads,
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
    } | {key: getattr(config, field) for field, key in EPSILON_FIELDS.items() if hasattr(config, field)}
    stated = {key: _field(file, f"{prefix}.{key}") for key in expected}
    if stated["attention.head_count_kv"] is None:  # llama.cpp's default
        stated["attention.head_count_kv"] = stated["attention.head_count"]
    expected = {key: value for key, value in expected.items() if value is not None}
    for key, value in expected.items():
        found = stated[key]
        if not isinstance(found, int | float) or abs(found - value) > EPSILON * abs(value):
            raise _bad(path, f"its metadata states {found} for {key}, and the model's config.json states {value}")
    return list(expected)


def _compare_tokens(file: GGUFReader, model_dir: Path, vocab_size: int, path: Path) -> None:
    """Compare the text of each token, without the mark for spaces. Raises BadAdapter."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    found = _field(file, "tokenizer.ggml.tokens") or []
    if len(found) < vocab_size:
        raise _bad(path, f"it has {len(found)} tokens, and the base model has {vocab_size}")
    for token, index in tokenizer.get_vocab().items():
        if index < vocab_size and found[index].replace(SPACE, " ") != token.replace(SPACE, " "):
            raise _bad(path, f"its token {index} is {found[index]!r}, and that of the base model is {token!r}")
    end = _field(file, "tokenizer.ggml.eos_token_id")
    if end != tokenizer.eos_token_id:
        raise _bad(path, f"it ends texts with token {end}, and the base model with {tokenizer.eos_token_id}")


def _field(file: GGUFReader, key: str) -> Any:
    return file.fields[key].contents() if key in file.fields else None


def _listed(names: list[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _bad(path: Path, reason: str) -> BadAdapter:
    return BadAdapter(
        f"{path.name}, which llama.cpp's converter wrote, can't be verified: {reason}.",
        remedy="Use the format 'merged'. If another version of llama.cpp supports the model, install that one.",
    )

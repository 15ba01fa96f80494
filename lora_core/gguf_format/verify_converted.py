# pyright: basic
"""Compares a GGUF file that llama.cpp's converter wrote with the model folder that it was converted from.

The file may be of any architecture, so its logits can't be computed here. Instead, each weight is found by llama.cpp's
name for it, and must equal that of the folder, rounded to the format. Weights that are not found so are listed as not
verified: they may have another name or layout. The adapter must not change any of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from gguf.quants import quantize
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from lora_core.base_model.model import load_base
from lora_core.errors import BadAdapter
from lora_core.gguf_format.architecture import PERMUTED, halves_to_pairs, pairs_to_halves
from lora_core.gguf_format.tokenizer import SPACE
from lora_core.gguf_format.verify import GgufReport, compute_logits, draw_ids
from lora_core.peft_format.export import PREFIX, WEIGHTS

Layout = Callable[[Tensor], Tensor]
NUM_NAMED = 3
"""Weights that a text names at most."""
EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedReport(GgufReport):
    """`explanation` states what was compared. The logits are those of the merged model with the weights that were found
    in the file, so rounding explains all of their difference."""

    explanation: str


def verify_converted(model_dir: Path, adapter_dir: Path, path: Path) -> ConvertedReport:
    """Compare `path` with the merged model in `model_dir`. Raises BadAdapter."""
    source = load_base(model_dir, dtype="float32", device="cpu")
    ids = draw_ids(source)
    adapted = compute_logits(source.model, ids)
    file = GGUFReader(path)
    config = source.model.config.get_text_config()
    metadata = _compare_metadata(file, config, path)
    _compare_tokens(file, model_dir, path)
    find, parameters, other = _tensors_by_name(file, config), dict(source.model.named_parameters()), []
    for name, parameter in parameters.items():
        stored = _stored(find(name), parameter.data, config)
        if stored is None:
            other.append(name)
        else:
            parameter.data = stored
    if wrong := _changed(other, adapter_dir):
        raise _bad(path, f"{_listed(wrong)} can't be found in it with the values of the merged model")
    difference = float((compute_logits(source.model, ids) - adapted).abs().max())
    if not difference < float("inf"):
        raise _bad(path, "its values are beyond the range of f16")
    text = (
        f"llama.cpp's converter wrote this file. {len(parameters) - len(other)} of {len(parameters)} weights are those "
        "of the merged model, rounded to the format, among them all that the adapter changes. "
        f"The tokens{metadata} are those of the base model. Other metadata was not compared."
    )
    text += f" Not verified: {_listed(other)}." if other else ""
    measured = GgufReport(max_abs_diff=difference, tolerance=difference, max_abs_logit=float(adapted.abs().max()))
    return ConvertedReport(**asdict(measured), explanation=text)


def _tensors_by_name(file: GGUFReader, config: Any) -> Callable[[str], ReaderTensor | None]:
    """Return a function from a weight's name in transformers to its tensor in the file."""
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}.get(_field(file, "general.architecture"))
    names = None if kind is None else gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors: dict[str | None, ReaderTensor] = {tensor.name: tensor for tensor in file.tensors}
    return lambda name: names and tensors.get(names.get_name(name, try_suffixes=(".weight", ".bias")))


def _stored(tensor: ReaderTensor | None, weight: Tensor, config: Any) -> Tensor | None:
    """Return the weight with the values of the file. None if the file has others, or a layout unknown here."""
    if tensor is None:
        return None
    for to_file, from_file in _layouts(weight, config):
        values = to_file(weight)
        if values.shape == tuple(reversed(tensor.shape.tolist())) and np.array_equal(
            quantize(values.numpy(), tensor.tensor_type), tensor.data
        ):
            return from_file(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))
    return None


def _layouts(weight: Tensor, config: Any) -> Iterator[tuple[Layout, Layout]]:
    """Yield the ways in which llama.cpp stores a weight, each with its inverse."""
    yield lambda rows: rows, lambda rows: rows
    if weight.ndim == 1:
        yield lambda rows: rows + 1, lambda rows: rows - 1  # Gemma's norms multiply by 1 + w
    if weight.ndim == 2:
        yield lambda rows: rows.T.contiguous(), lambda rows: rows.T.contiguous()  # GPT-2's matrices are [in, out]
    heads: set[Any] = {getattr(config, field, None) for field in PERMUTED.values()} - {None}
    for num_heads in heads:
        if weight.shape[0] % (2 * num_heads) == 0:  # projections of queries and keys that are rotated as Llama's
            yield partial(halves_to_pairs, num_heads=num_heads), partial(pairs_to_halves, num_heads=num_heads)


def _changed(names: list[str], adapter_dir: Path) -> list[str]:
    """Return the weights that belong to a module that the adapter changes."""
    with safe_open(adapter_dir / WEIGHTS, framework="pt") as adapter:
        keys = [key.removeprefix(PREFIX) for key in adapter.keys()]  # noqa: SIM118  (not a dict)
    return [name for name in names if any(key.startswith(f"{name.rpartition('.')[0]}.") for key in keys)]


def _compare_metadata(file: GGUFReader, config: Any, path: Path) -> str:
    """Compare the numbers on which a model's outputs depend, and that its tensors do not show. Returns what was
    compared, for a text. Raises BadAdapter."""
    prefix, rope = _field(file, "general.architecture"), getattr(config, "rope_parameters", None) or {}
    expected = {
        "attention.head_count": getattr(config, "num_attention_heads", None),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
    }
    compared = []
    for key, value in expected.items():
        found = _field(file, f"{prefix}.{key}")
        if value is None or not isinstance(found, int | float):
            continue
        if abs(found - value) > EPSILON * abs(value):
            raise _bad(path, f"its metadata states {found} for {key}, and the model's config.json states {value}")
        compared.append(key)
    return f", {', '.join(compared)}" if compared else ""


def _compare_tokens(file: GGUFReader, model_dir: Path, path: Path) -> None:
    """Compare the text of each token, without the mark for spaces. Raises BadAdapter."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    found = _field(file, "tokenizer.ggml.tokens") or []
    for token, index in tokenizer.get_vocab().items():
        if index < len(found) and found[index].replace(SPACE, " ") != token.replace(SPACE, " "):
            raise _bad(path, f"its token {index} is {found[index]!r}, and that of the base model is {token!r}")
    end = _field(file, "tokenizer.ggml.eos_token_id")
    if not found or end not in (None, tokenizer.eos_token_id):
        raise _bad(path, f"it has {len(found)} tokens and ends texts with token {end}, unlike the base model")


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

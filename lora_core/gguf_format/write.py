# pyright: basic
"""Writes a model folder as a GGUF file, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from safetensors import safe_open
from torch import Tensor

from lora_core.base_model.loading import read_config, weight_names
from lora_core.errors import UnsupportedModel
from lora_core.gguf_format.architecture import Architecture, architecture_of
from lora_core.gguf_format.tokenizer import add_tokenizer

Precision = Literal["f16", "q8_0"]
"""Storage of the matrices. Norms and biases stay in fp32."""
KINDS = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
BLOCK = 32
"""Values of a row that share a scale in q8_0."""
ROTARY_FACTORS = "rope_freqs.weight"


def write_gguf(model_dir: Path, path: Path, *, precision: Precision, name: str) -> None:
    """Write `path`, a GGUF file with the weights and the tokenizer of `model_dir`. name: `general.name` in the file.

    Raises UnsupportedModel for a family, tokenizer or weight that the file can't represent, and OSError.
    """
    architecture = architecture_of(read_config(model_dir))
    writer = GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.add_hyperparameters(writer)
    add_tokenizer(writer, model_dir, vocab_size=architecture.config.vocab_size)
    sources = list(_sources(model_dir, architecture))
    for target, _, _, shape in sources:
        _announce(writer, target, shape, kind_of(shape, precision))
    factors = architecture.rotary_factors()
    if factors is not None:
        _announce(writer, ROTARY_FACTORS, tuple(factors.shape), GGMLQuantizationType.F32)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, file_path, source, shape in sources:
            with safe_open(file_path, framework="pt") as file:
                rows = architecture.to_gguf(source, file.get_tensor(source))
            writer.write_tensor_data(_stored(target, rows, kind_of(shape, precision)))
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
    finally:
        writer.close()


def kind_of(shape: tuple[int, ...], precision: Precision) -> GGMLQuantizationType:
    """Return how a tensor is stored. A matrix whose rows are no multiple of a block is stored in f16 at least."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return KINDS[precision] if shape[-1] % BLOCK == 0 else GGMLQuantizationType.F16


def _sources(model_dir: Path, architecture: Architecture) -> Iterator[tuple[str, Path, str, tuple[int, ...]]]:
    """Yield (name in GGUF, file, name in the file, shape) of each tensor."""
    for file_name in weight_names(model_dir):
        with safe_open(model_dir / file_name, framework="pt") as file:
            for source in file.keys():  # noqa: SIM118  (not a dict)
                if source == "lm_head.weight" and architecture.has_tied_head:
                    continue
                shape = tuple(file.get_slice(source).get_shape())
                yield architecture.tensor_name(source), model_dir / file_name, source, shape


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    num_bytes = int(np.prod(gguf.quants.quant_shape_to_byte_shape(shape, kind)))
    dtype = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind, np.int8)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    writer.add_tensor_info(name, shape, np.dtype(dtype), num_bytes, raw_dtype=kind)


def _stored(name: str, rows: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the bytes to store. Raises UnsupportedModel for values beyond the range of f16."""
    values = rows.to(torch.float32).numpy()
    with np.errstate(over="ignore"):  # reported below
        stored = gguf.quants.quantize(values, kind)
    if kind is GGMLQuantizationType.F16 and not np.isfinite(stored).all():
        raise UnsupportedModel(
            f"The tensor {name} contains values beyond the range of f16, {torch.finfo(torch.float16).max:,.0f}.",
            remedy="Use the format 'merged'.",
        )
    return stored

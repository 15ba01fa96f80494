# pyright: basic
"""Writes an adapter in PEFT's layout as a GGUF file that llama.cpp applies to a GGUF file of the base model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, LlamaFileType
from safetensors import safe_open
from torch import Tensor

from lora_core.base_model.loading import read_config
from lora_core.errors import UnsupportedModel
from lora_core.gguf_format.architecture import Architecture, architecture_of
from lora_core.module_paths import pattern_value
from lora_core.peft_format.export import CONFIG, PREFIX, WEIGHTS


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPair:
    """A [r, in] and B [out, r] of one linear layer, in fp32. Its update is `scale` B A."""

    a: Tensor
    b: Tensor
    scale: float


def write_gguf_lora(adapter_dir: Path, base_dir: Path, path: Path, *, name: str) -> None:
    """Write `path`. The matrices stay exact: they are stored in fp32.

    llama.cpp multiplies B A by alpha / rank, with one alpha for all layers. B is multiplied by the rest, if a layer has
    another scale. Raises UnsupportedModel if the adapter has parts that the format can't contain.
    """
    settings = json.loads((adapter_dir / CONFIG).read_text("utf-8"))
    refuse_other_parts(settings)
    architecture = architecture_of(read_config(base_dir))
    alpha = float(settings["lora_alpha"])
    writer = GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for module, pair in lora_pairs(adapter_dir, settings).items():
        _refuse_tied_head(module, architecture)
        rest = pair.scale * pair.a.shape[0] / alpha if alpha else 0.0
        b = pair.b if rest == 1 else pair.b * rest
        target = architecture.tensor_name(f"{module}.weight")
        writer.add_tensor(f"{target}.lora_a", pair.a.numpy())
        writer.add_tensor(f"{target}.lora_b", architecture.to_gguf(f"{module}.weight", b).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def lora_pairs(adapter_dir: Path, settings: Mapping[str, Any]) -> dict[str, LoraPair]:
    """Return the matrices by module path, such as `model.layers.0.mlp.up_proj`. Raises UnsupportedModel."""
    with safe_open(adapter_dir / WEIGHTS, framework="pt") as file:
        tensors = {name.removeprefix(PREFIX): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    foreign = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign:
        raise _unsupported(f"it contains {foreign[0]}")
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
    return {
        module: LoraPair(
            a=tensors[f"{module}.lora_A.weight"].contiguous(),
            b=tensors[f"{module}.lora_B.weight"].contiguous(),
            scale=_scale(module, tensors[f"{module}.lora_A.weight"].shape[0], settings),
        )
        for module in modules
    }


def refuse_other_parts(settings: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel if the config of an adapter names parts other than A and B of linear layers."""
    parts = {
        "use_dora": "it uses DoRA",
        "modules_to_save": "it contains whole modules (modules_to_save)",
        "trainable_token_indices": "it contains embeddings (trainable_token_indices)",
        "lora_bias": "it contains biases (lora_bias)",
    }
    for field, reason in parts.items():
        if settings.get(field):
            raise _unsupported(reason)
    if settings.get("bias", "none") != "none":
        raise _unsupported("it contains biases (bias)")


def _scale(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    patterns = tuple((settings.get("alpha_pattern") or {}).items())
    alpha = float(pattern_value(module, patterns, settings["lora_alpha"]))
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _refuse_tied_head(module: str, architecture: Architecture) -> None:
    if module == "lm_head" and architecture.has_tied_head:
        raise _unsupported("it changes the output head, whose weight this base model shares with its embeddings")


def _unsupported(reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The adapter can't be exported as 'gguf-lora': {reason}. The format contains only the matrices A and B of "
        "linear layers.",
        remedy="Use the format 'gguf' or 'merged', which contain the merged weights.",
    )

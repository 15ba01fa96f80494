# pyright: basic
"""Exports an adapter in PEFT's layout, with logits that the engine computes from it as evidence for verification.

The exported weights are those that training computed with, in the base model's dtype, so that PEFT multiplies by the
same numbers. The fp32 master weights stay in checkpoints.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.base_model.quantization import Quantization
from lora_core.forward.classification import head_alone, head_inputs, head_module
from lora_core.forward.language_model import hidden_states
from lora_core.layers.lm_heads import head_of
from lora_core.layers.task_heads import class_logits
from lora_core.module_paths import layer_of, matches
from lora_core.packing.packed_batch import SliceInput, build_pack
from lora_core.peft_format import verification_linears, verification_modules
from lora_core.runtime.counter_rng import random_words
from lora_core.runtime.safetensors_io import file_sha256, write_directory, write_json
from lora_core.runtime.transfers import NamedVectors

PROBE_ROWS, PROBE_TOKENS, PROBE_POSITIONS = 2, 48, 2
PROBE_SEED = 20_260_101
PREFIX = "base_model.model."
CONFIG, WEIGHTS, PROBE = "adapter_config.json", "adapter_model.safetensors", "probe.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """Result of an export.

    `sha256` is the digest of adapter_model.safetensors, `num_parameters` the number of trained parameters, and
    `quantization` that of the base model in training.
    """

    num_parameters: int
    num_bytes: int
    sha256: str
    dtype: str
    quantization: Quantization = "none"


def export_adapter(
    base: BaseModel,
    adapter: FlatAdapter,
    directory: Path,
    *,
    base_name: str,
    base_revision: str | None = None,
    has_evidence: bool = True,
) -> ExportReport:
    """Write adapter_config.json, adapter_model.safetensors and probe.safetensors. `directory` must not exist.

    `base_name` and `base_revision` are `base_model_name_or_path` and `revision` in adapter_config.json, from which
    PEFT's AutoPeftModel classes load the base model: an id on the Hub and its commit, or a folder.

    Without `has_evidence` there is no probe, which takes several passes. Checkpoints don't need it, since they aren't
    verified. Raises OSError.
    """
    probe = _probe(base, adapter) if has_evidence else None  # before writing, which may fail on a single rank
    snapshot = take_adapter_snapshot(base, adapter, base_name=base_name, base_revision=base_revision, probe=probe)
    return snapshot.write(directory)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSnapshot:
    """An adapter's weights. They are valid until the next tick, `lasting` ones permanently.

    `parts` maps each of PEFT's names to the name of a vector, and to the start and the shape of its part.
    """

    vectors: NamedVectors
    parts: dict[str, tuple[str, int, torch.Size]]
    config: dict[str, object]
    metadata: dict[str, str]
    probe: dict[str, Tensor] | None
    num_parameters: int
    dtype: torch.dtype
    quantization: Quantization

    def lasting(self) -> "AdapterSnapshot":
        """Begin to copy the vectors to the host. Raises torch.OutOfMemoryError."""
        return replace(self, vectors=self.vectors.lasting())

    def write(self, directory: Path) -> ExportReport:
        """Write the files of `export_adapter`. A lasting snapshot may be written in any thread.

        Raises OSError and torch.OutOfMemoryError.
        """
        write_directory(directory, self._fill)
        weights_file = directory / WEIGHTS
        return ExportReport(
            num_parameters=self.num_parameters,
            num_bytes=weights_file.stat().st_size,
            sha256=file_sha256(weights_file),
            dtype=str(self.dtype).removeprefix("torch."),
            quantization=self.quantization,
        )

    def _fill(self, directory: Path) -> None:
        vectors = self.vectors.on_host()
        tensors = {
            name: vectors[vector][start : start + shape.numel()].view(shape)
            for name, (vector, start, shape) in self.parts.items()
        }
        save_file(tensors, directory / WEIGHTS, metadata=self.metadata)
        write_json(directory / CONFIG, self.config)
        if self.probe is not None:
            save_file(self.probe, directory / PROBE)


def take_adapter_snapshot(
    base: BaseModel,
    adapter: FlatAdapter,
    *,
    base_name: str,
    base_revision: str | None = None,
    probe: dict[str, Tensor] | None = None,
) -> AdapterSnapshot:
    vectors = {
        "weights": adapter.compute,
        "paired": adapter.paired,
        "magnitudes": adapter.p[adapter.num_ab : adapter.num_lora],
    }
    views = adapter_views(adapter)
    used = {name: vectors[name] for name in sorted({vector for vector, _ in views.values()})}
    return AdapterSnapshot(
        vectors=NamedVectors(vectors=used),
        parts={
            name: (vector, view.storage_offset() - vectors[vector].storage_offset(), view.shape)
            for name, (vector, view) in views.items()
        },
        config=peft_config(base, adapter, base_name, base_revision),
        metadata=_metadata(base),
        probe=probe,
        num_parameters=adapter.num_parameters,
        dtype=adapter.dtype,
        quantization=base.quantization,
    )


def _metadata(base: BaseModel) -> dict[str, str]:
    """Return the metadata of the weights. It includes the quantization, for which adapter_config.json has no field."""
    if base.quantization == "none":
        return {"format": "pt"}
    how = base.model.config.quantization_config.to_dict()
    return {"format": "pt", "base_quantization_config": json.dumps(how, sort_keys=True)}


def adapter_views(adapter: FlatAdapter) -> dict[str, tuple[str, Tensor]]:
    """Return the tensors by PEFT's names: lora_A.weight [R, D], lora_B.weight [O, R], and DoRA's magnitude [O].

    Each is a view of the vector that is named with it. Tensors trained in full have the names of the module. If the
    start is subtracted, the rank is doubled to [A; A₀] and [B, -B₀], which is correct for the unmodified base model.
    """
    read = "paired" if adapter.lora.subtracts_start else "weights"
    tensors: dict[str, tuple[str, Tensor]] = {}
    for name, views in adapter.sites.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = read, views.a_RD
        tensors[f"{PREFIX}{name}.lora_B.weight"] = read, views.b_OR
        if views.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = "magnitudes", views.magnitude.m_O
    for name, trained in adapter.tensors.items():
        tensors[f"{PREFIX}{name}"] = "weights", trained.value
    return tensors


def peft_config(
    base: BaseModel, adapter: FlatAdapter, base_name: str, base_revision: str | None = None
) -> dict[str, object]:
    conv1d = any(type(module).__name__ == "Conv1D" for module in base.model.modules())
    names, layers = target_names(base, adapter)
    lora = adapter.lora
    times, alpha_times = (2, math.sqrt(2) if lora.use_rslora else 2) if lora.subtracts_start else (1, 1)
    ranks: dict[str, float] = {name: times * lora.rank_of(name) for name in adapter.sites}
    alphas: dict[str, float] = {name: alpha_times * lora.alpha_of(name) for name in adapter.sites}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if base.task == "causal-lm" else "SEQ_CLS",
        "base_model_name_or_path": base_name,
        **({} if base_revision is None else {"revision": base_revision}),
        "r": times * lora.rank,
        "lora_alpha": alpha_times * lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "rank_pattern": exceptions(ranks, times * lora.rank),
        "alpha_pattern": exceptions(alphas, alpha_times * lora.alpha),
        "target_modules": names,
        "layers_to_transform": layers,
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "modules_to_save": list(adapter.trained.modules) or None,
        "trainable_token_indices": list(adapter.trained.token_ids) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def exceptions(values: dict[str, float], usual: float) -> dict[str, float]:
    """Return PEFT's pattern (rank_pattern or alpha_pattern) for the modules whose value is not `usual`.

    A key is the short name if all modules of that name have the value, otherwise the path. A user's regular expression
    is therefore never evaluated by programs that load the adapter.
    """
    by_name: dict[str, set[float]] = {}
    for path, value in values.items():
        by_name.setdefault(_short(path), set()).add(value)
    return {
        _short(path) if len(by_name[_short(path)]) == 1 else path: value
        for path, value in values.items()
        if value != usual
    }


def target_names(base: BaseModel, adapter: FlatAdapter) -> tuple[list[str], list[int] | None]:
    """Return (target_modules, layers_to_transform) for PEFT.

    Prefers short names that match exactly the adapted modules, which inference servers expect. Second choice are short
    names within the job's layers_to_transform, otherwise full paths.
    """
    short = sorted({_short(name) for name in adapter.sites})
    matched = {name for name in base.linear_names() if any(matches(name, suffix) for suffix in short)}
    if matched == adapter.sites.keys():
        return short, None
    layers = adapter.lora.layers_to_transform
    if layers is not None and {name for name in matched if layer_of(name) in layers} == adapter.sites.keys():
        return short, sorted(layers)
    return sorted(adapter.sites), None


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _probe(base: BaseModel, adapter: FlatAdapter) -> dict[str, Tensor]:
    """Return the evidence: pseudo-random ids, the engine's logits with and without the adapter, and the outputs of each
    adapted linear and of modules trained in full."""
    ids = with_tokens(pseudo_random_ids(base, "probe", PROBE_SEED), _trained_tokens(base, adapter))
    bare = FlatAdapter((), adapter.lora, dtype=base.dtype, device=base.device, trained=head_alone(base, adapter))
    bare.initialize(0)
    return {
        "input_ids": torch.from_numpy(ids),
        "logits": packed_logits(base, adapter, ids),
        "base_logits": packed_logits(base, bare, ids),
        **verification_linears.evidence(base, adapter),
        **verification_modules.evidence(base, adapter),
    }


def _trained_tokens(base: BaseModel, adapter: FlatAdapter) -> list[int]:
    """Return the tokens with trained embeddings. The padding token has no gradient and may end a sequence."""
    padding = getattr(base.model.get_input_embeddings(), "padding_idx", None)
    return [token for token in adapter.trained.token_ids if token != padding]


def with_tokens(ids: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Return `ids` with the tokens inserted, so that the logits depend on them.

    They are placed from the end backwards, where the logits depend on them most. They fill at most half of the
    positions; of a longer list an evenly spaced selection is used.
    """
    num_rows, num_places = ids.shape
    count = min(len(tokens), ids.size // 2)
    chosen = np.linspace(0, len(tokens) - 1, count).astype(np.int64)
    places, found = np.arange(count), ids.copy()
    found[places % num_rows, num_places - 1 - places // num_rows] = np.array(tokens, np.int64)[chosen]
    return found


def pseudo_random_ids(base: BaseModel, purpose: str, seed: int) -> np.ndarray:
    """Return int64 [2, 48], or fewer columns for a base model with less positions. Deterministic and not user data."""
    num_tokens = min(PROBE_TOKENS, base.max_positions or PROBE_TOKENS)
    words = random_words(purpose, seed, count=PROBE_ROWS * num_tokens)
    return (words % np.uint64(base.vocab_size)).astype(np.int64).reshape(PROBE_ROWS, num_tokens)


@torch.no_grad()
def packed_logits(base: BaseModel, adapter: FlatAdapter, ids: np.ndarray) -> Tensor:
    """Return fp32 [rows, 2, V]: the engine's logits at the last two positions of each row.

    For a sequence classifier they are [rows, 1, C], from the job's own head.
    """
    no_labels = np.zeros(ids.shape[1], np.uint8)
    sequences = tuple((row_ids.astype(np.int32), no_labels) for row_ids in ids)
    pack = build_pack(
        [SliceInput(adapter=adapter, sequences=sequences, label_weight=0.0, dropout=None)], device=base.device
    )
    if base.task != "causal-lm":
        h_PD = head_inputs(base, pack, hidden_states(base, pack))[: len(ids)]
        return class_logits(base.model, head_module(base, adapter), h_PD)[:, None].cpu()
    hidden = hidden_states(base, pack)[: ids.size].view(*ids.shape, -1)
    last = hidden[:, -PROBE_POSITIONS:]
    return head_of(base.head(), adapter).logits(last.flatten(0, 1)).float().view(len(ids), PROBE_POSITIONS, -1).cpu()

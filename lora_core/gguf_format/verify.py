# pyright: basic
"""Reads GGUF files back and compares their logits with those of the source, over pseudo-random sequences.

A model is read by transformers' own reader of GGUF files. Its logits must be those of the source whose weights are
rounded to the format, so that rounding hides no other error. The remaining tolerance is measured: three times the
largest effect on the logits of rounding errors in fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.quants import quantize
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig

from lora_core.base_model.loading import load_with_transformers, read_config
from lora_core.base_model.model import BaseModel, load_base
from lora_core.errors import BadAdapter
from lora_core.gguf_format.architecture import architecture_of, plain_frequencies
from lora_core.gguf_format.write import BLOCK, ROTARY_FACTORS, Precision, kind_of
from lora_core.peft_format.export import pseudo_random_ids
from lora_core.peft_format.verify import NUM_NUDGES, ROUNDING_FACTOR

PROBE_SEED = 20_261_130
ROWS = 4096
"""Rows of a matrix that are rounded at once, to save memory."""
LARGEST_CODE = 127
"""Largest absolute code of a value in q8_0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufReport:
    """Largest difference of the logits of the file and of its source, in fp32, and the part that storage explains:
    the effect of rounding the weights of the source to the format, plus errors of computation."""

    max_abs_diff: float
    tolerance: float
    max_abs_logit: float


def verify_gguf(model_dir: Path, path: Path, *, precision: Precision) -> GgufReport:
    """Compare a GGUF file with the model folder that it was written from. Raises BadAdapter, with the numbers."""
    source = load_base(model_dir, dtype="float32", device="cpu")
    ids = draw_ids(source)
    adapted = compute_logits(source.model, ids)
    _round_weights(source.model, precision)
    rounded, effect = _measured(source.model, ids)
    del source
    return _passed(compute_logits(_read_model(path), ids), rounded, effect, path, adapted=adapted)


def verify_gguf_lora(adapter_dir: Path, base_dir: Path, path: Path) -> GgufReport:
    """Compare a LoRA file with PEFT's logits for the adapter, both on the base model in fp32. Raises BadAdapter."""
    base = load_base(base_dir, dtype="float32", device="cpu")
    ids = draw_ids(base)
    adapted = PeftModel.from_pretrained(base.model, str(adapter_dir), is_trainable=False).eval()
    expected = compute_logits(adapted, ids)
    updated = _add_updates(cast(nn.Module, adapted.unload()), base_dir, path)
    found, effect = _measured(updated, ids)
    return _passed(found, expected, effect, path, adapted=expected)


def draw_ids(base: BaseModel) -> Tensor:
    return torch.from_numpy(pseudo_random_ids(base, "gguf", PROBE_SEED))


@torch.no_grad()
def compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _round_weights(model: nn.Module, precision: Precision) -> None:
    """Replace each matrix by the values that the file stores. Raises BadAdapter if one is off by more than rounding."""
    for name, parameter in model.named_parameters():
        kind = kind_of(tuple(parameter.shape), precision)
        if kind is GGMLQuantizationType.F32:
            continue
        rounded = torch.empty_like(parameter.data)
        for rows, stored in zip(parameter.data.split(ROWS), rounded.split(ROWS), strict=True):
            stored.copy_(torch.from_numpy(dequantize(quantize(rows.numpy(), kind), kind)))
            if not bool(((stored - rows).abs() <= largest_error(rows, kind)).all()):
                raise BadAdapter(
                    f"The model can't be exported: {kind.name} changes a value of {name} by more than half a step.",
                    remedy="Use the format 'merged', and report this as a bug of Lorry.",
                )
        parameter.data = rounded


def _measured(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    """Return the logits, and the largest effect on them of random rounding errors in fp32."""
    logits, effect = compute_logits(model, ids), 0.0
    for seed in range(NUM_NUDGES):
        with _rounding_errors(model, seed=seed):
            effect = max(effect, float((compute_logits(model, ids) - logits).abs().max()))
    return logits, effect


def _passed(found: Tensor, rounded: Tensor, effect: float, path: Path, *, adapted: Tensor) -> GgufReport:
    """Compare the logits of the file with those of the rounded source. adapted: those of the source itself."""
    largest = float(rounded.abs().max())
    least = torch.finfo(torch.float32).eps * largest * BLOCK
    allowed = ROUNDING_FACTOR * max(least, effect)
    error = float((found - rounded).abs().max())
    if not error <= allowed:
        raise BadAdapter(
            f"{path.name} can't be exported: its logits differ by {error:.3g} from those of the adapted model, rounded "
            f"to its format, but computation in fp32 explains only {allowed:.3g}.",
            remedy="Use the format 'merged', and report this as a bug of Lorry.",
        )
    return GgufReport(
        max_abs_diff=float((found - adapted).abs().max()),
        tolerance=float((rounded - adapted).abs().max()) + allowed,
        max_abs_logit=largest,
    )


def _read_model(path: Path) -> nn.Module:
    """Load a model from its GGUF file with transformers, in fp32. transformers ignores scaled rotary embeddings, and
    the size of a head for some families, so both are read from the file here."""
    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    config.head_dim = _metadata(reader, f"{architecture}.attention.key_length")
    model: Any = load_with_transformers(path.parent, dtype=torch.float32, gguf_file=path.name, config=config)
    frequencies = plain_frequencies(config) / _rotary_scale(reader, architecture)
    model.model.rotary_emb.inv_freq = frequencies
    model.model.rotary_emb.original_inv_freq = frequencies
    return model.eval()


def _rotary_scale(reader: GGUFReader, architecture: str) -> Tensor:
    """Return the divisors of the rotary frequencies, fp32 [head_dim / 2] or a scalar."""
    factors = next((tensor for tensor in reader.tensors if tensor.name == ROTARY_FACTORS), None)
    if factors is not None:
        return torch.from_numpy(factors.data.copy())
    if f"{architecture}.rope.scaling.factor" in reader.fields:
        return torch.tensor(float(_metadata(reader, f"{architecture}.rope.scaling.factor")))
    return torch.tensor(1.0)


def _metadata(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _add_updates(model: nn.Module, base_dir: Path, path: Path) -> nn.Module:
    """Add the updates that a LoRA file contains to the weights of the model, as llama.cpp computes them. Returns it."""
    architecture = architecture_of(read_config(base_dir))
    reader = GGUFReader(path)
    alpha = float(_metadata(reader, "adapter.lora.alpha"))
    stored = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in reader.tensors
    }
    modules = {
        f"{architecture.tensor_name(f'{name}.weight')}.lora": (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (name == "lm_head" and architecture.has_tied_head)
    }
    for key in sorted({name.rsplit("_", 1)[0] for name in stored}):
        name, module = modules[key]
        a, b = stored[f"{key}_a"], architecture.from_gguf(f"{name}.weight", stored[f"{key}_b"])
        module.weight.data = module.weight.data + (alpha / b.shape[1]) * (b @ a)
    return model


@contextmanager
def _rounding_errors(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Add random errors of up to half a unit in the last place to the weights of linear layers and embeddings while the
    context is open. Only one weight at a time has a copy."""
    random = torch.Generator()

    def drawn(module: nn.Module) -> Tensor:
        weight = cast(Tensor, module.weight)
        random.manual_seed(hash((seed, tuple(weight.shape), float(weight.flatten()[0]))) % 2**63)
        signs = 2 * torch.rand(weight.shape, generator=random) - 1
        return signs * weight.abs() * torch.finfo(torch.float32).eps / 2

    def of_linear(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + functional.linear(inputs[0], drawn(module))

    def of_embedding(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + functional.embedding(inputs[0], drawn(module))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(of_linear))
        elif isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_hook(of_embedding))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def largest_error(weight: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Return the largest rounding error of each value in f16 or q8_0, fp32 with the shape of `weight` [out, in].

    f16: half a unit in the last place. q8_0: half a step, and the error of the step, which is the largest of 32 values
    divided by 127 and is stored in f16. A part in a thousand is added for the rounding of this bound.
    """
    half_unit = float(np.finfo(np.float16).eps) / 2
    least = float(np.finfo(np.float16).smallest_subnormal) / 2
    if kind is GGMLQuantizationType.F16:
        return 1.001 * (weight.abs() * half_unit + least)
    blocks = weight.reshape(-1, BLOCK).abs()
    steps = (blocks.amax(dim=1, keepdim=True) / LARGEST_CODE).expand_as(blocks).reshape(weight.shape)
    return 1.001 * (steps / 2 + LARGEST_CODE * (steps * half_unit + least))

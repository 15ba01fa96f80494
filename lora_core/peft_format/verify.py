# pyright: basic
"""Verifies that an exported adapter, loaded by PEFT on the resident base model, reproduces the engine's logits.

It compares each adapted linear separately, which checks every matrix up to rounding (verification_linears.py), and the
logits of the whole model. The tolerance of the logits is derived from measured rounding errors (`_compare`).
"""

import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from lora_core.base_model.model import BaseModel
from lora_core.errors import BadAdapter, OutOfMemory, UnsafeFile
from lora_core.forward.progress_hooks import Between, calling_at_linears, silent
from lora_core.layers.task_heads import own_head, task_head_of
from lora_core.peft_format import verification_linears, verification_modules
from lora_core.peft_format.export import CONFIG, PREFIX, PROBE, PROBE_POSITIONS, WEIGHTS
from lora_core.peft_format.verification_linears import ROUNDING_FACTOR, LinearsReport
from lora_core.runtime.device_errors import is_device_fault, is_shortage, shortage_in_pass
from lora_core.runtime.safetensors_io import read_header

LOGITS_FACTOR = 6
NUM_NUDGES = 3
SAME_MODEL = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Fraction of the largest logit by which two operation orders of one model may differ. Other models differ far more."""
SAME_INT8_MODEL = 0.1
LEVELS = 127
"""An int8 linear rounds its inputs to this many integer steps in each direction (arXiv 2208.07339). A tiny change of an
input near the middle between two steps moves it by a whole step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Differences between PEFT and the engine over all probed logits, with their tolerances. In logits.

    A value that is not finite is reported as the largest float, so that every report is valid JSON, and fails.

    Attributes:
        max_abs_effect: Largest change of a logit by the adapter.
        num_positions: Number of probed positions.
        worst_linear: The adapted linear, head or embeddings with the largest error.
        worst_linear_error: Its error as a fraction of its tolerance.
        explanation: Sentences on the comparison and its tolerance.
    """

    max_abs_diff: float
    max_abs_logit: float
    tolerance: float
    rms_diff: float
    rms_tolerance: float
    max_abs_effect: float
    passed: bool
    num_positions: int
    num_linears: int
    worst_linear: str
    worst_linear_error: float
    explanation: str


def verify_export(base: BaseModel, directory: Path, *, between: Between = silent) -> VerifyReport:
    """Compare PEFT's logits with probe.safetensors. The base model is restored afterwards.

    Runs six passes (nine on an int8 base model) over two short sequences on the resident base model. `between` is
    called after each linear. Raises BadAdapter, and OutOfMemory with the name of the directory if PEFT's passes don't
    fit on the device, or BrokenPass if the base model is sharded.
    """
    try:
        with shortage_in_pass(is_sharded=base.is_sharded), calling_at_linears(base, between):
            return _verify(base, directory)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(directory.name) from error


def _verify(base: BaseModel, directory: Path) -> VerifyReport:
    probe = _load_probe(base, directory)
    added, in_full = _evidence(probe, verification_linears.PREFIX), _evidence(probe, verification_modules.PREFIX)
    with base.untouched() as model, _with_head(base, directory), torch.no_grad():
        ids = probe["input_ids"].to(base.device)
        roundings = [_last_logits(model, ids) - probe["base_logits"]]
        with _adapted(model, directory, device=base.device) as adapted:
            _check_same_linears(model, added)
            more = verification_modules.errors(model, in_full, dtype=base.dtype)
            linears = verification_linears.compare(model, added, dtype=base.dtype, more=more)
            logits = _last_logits(adapted, ids)
            roundings += [_nudged_logits(adapted, ids, seed=seed) - logits for seed in range(NUM_NUDGES)]
            if base.quantization == "int8":
                roundings += [_stepped_logits(adapted, ids, seed=seed) - logits for seed in range(NUM_NUDGES)]
        with _adapted(model, directory, device=base.device, in_fp32=False) as adapted:
            roundings.append(_last_logits(adapted, ids) - logits)
    same_model = SAME_INT8_MODEL if base.quantization == "int8" else SAME_MODEL[base.dtype]
    return _compare(probe, logits, roundings=roundings, dtype=base.dtype, linears=linears, same_model=same_model)


def _evidence(probe: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the evidence by module name."""
    return {name.removeprefix(prefix): tensor for name, tensor in probe.items() if name.startswith(prefix)}


def _check_same_linears(model: torch.nn.Module, added: dict[str, Tensor]) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    shapes = {name: verification_linears.shape_of(layer) for name, layer in layers.items()}
    found = {name: tuple(tensor.shape) for name, tensor in added.items()}
    if shapes != found:
        different = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
        raise _bad(f"PEFT adapts other layers than training did, for example {different[0]}")


def _compare(
    probe: dict[str, Tensor],
    logits: Tensor,
    *,
    roundings: list[Tensor],
    dtype: torch.dtype,
    linears: LinearsReport,
    same_model: float,
) -> VerifyReport:
    """Compare logits. The tolerance is a multiple of the largest of `roundings`, each caused by rounding alone.

    - Without an adapter: the difference between the engine and transformers, which compute the same function in two
      operation orders.
    - A high learning rate can make an adapter that magnifies the rounding of every layer. Measured as the change if the
      output of every adapted linear is perturbed randomly by at most half a unit in its last place (Parker 1997, Monte
      Carlo arithmetic), in each of three draws with fixed seeds.
    - The engine multiplies by A and B in the base model's dtype, PEFT by default in fp32 (`autocast_adapter_dtype`):
      the difference between PEFT's two modes. It is zero in fp32.
    - An int8 linear rounds its inputs to steps: the change if one input of each token is off by a step in each linear.

    The first counts only if it is within `same_model` of the largest logit, since another base model would widen its
    own tolerance. Each is at least half a unit in the last place of the largest logit. The maximum and the root mean
    square of the difference must both be within tolerance: the root mean square detects a wrong adapter much earlier.
    A chaotic adapter alternates between a few outcomes, some of them rare. If the factor of three is exceeded and each
    linear is verified on its own, the logits may differ by six times.
    """
    largest, difference = _largest(probe["logits"]), logits - probe["logits"]
    least = max(torch.finfo(dtype).eps * largest / 2, torch.finfo(torch.float32).tiny)
    rounding, rms_rounding = max(least, *map(_largest, roundings)), max(least, *map(_rms, roundings))
    needed = max(_largest(difference) / rounding, _rms(difference) / rms_rounding)
    proven = linears.worst_error <= 1
    factor = LOGITS_FACTOR if proven and needed > ROUNDING_FACTOR else ROUNDING_FACTOR
    tolerance, rms_tolerance = factor * rounding, factor * rms_rounding
    is_same_base = _largest(roundings[0]) <= same_model * _largest(probe["base_logits"])
    numbers = {
        "max_abs_diff": _largest(difference),
        "max_abs_logit": largest,
        "tolerance": tolerance,
        "rms_diff": _rms(difference),
        "rms_tolerance": rms_tolerance,
        "max_abs_effect": _largest(probe["logits"] - probe["base_logits"]),
    }
    passed = is_same_base and numbers["max_abs_diff"] <= tolerance and numbers["rms_diff"] <= rms_tolerance
    passed = passed and proven and all(map(math.isfinite, numbers.values())) and largest > 0
    return VerifyReport(
        **{name: _finite(number) for name, number in numbers.items()},
        passed=passed,
        num_positions=logits.shape[0] * logits.shape[1],
        num_linears=linears.num_linears,
        worst_linear=linears.worst_linear,
        worst_linear_error=_finite(linears.worst_error),
        explanation=_explained(linears, tolerance, factor=factor, dtype=dtype) if largest > 0 else ALL_ZERO,
    )


ALL_ZERO = "Every logit is zero with this adapter. Training has ruined it, so it can't be verified."


def _finite(number: float) -> float:
    """Replace NaN and infinity, which JSON and databases don't support, by the largest float."""
    return number if math.isfinite(number) else sys.float_info.max


def _explained(linears: LinearsReport, tolerance: float, *, factor: int, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    logits = (
        f"Rounding in {name} alone changes the logits of this adapter by up to {tolerance / factor:.2g}. The logits "
        f"pass if they differ by at most {factor} times that, {tolerance:.2g}."
    )
    if not math.isfinite(tolerance):
        logits = "With this adapter, logits or their rounding errors are not finite, so they can't be compared."
    if linears.worst_error <= 1:
        share = f"{linears.worst_error:.0%} of what rounding explains"
        return (
            f"In each of the {linears.num_linears} LoRA layers, PEFT adds the same output as training did. The largest "
            f"difference is {share}. {logits}"
        )
    times = f"{linears.worst_error:.2g} times what" if math.isfinite(linears.worst_error) else "more than"
    return f"The output of {linears.worst_linear} in PEFT differs by {times} rounding explains. {logits}"


def _largest(logits: Tensor) -> float:
    return float(logits.abs().max())


def _rms(logits: Tensor) -> float:
    return float(logits.square().mean().sqrt())


def _last_logits(model: torch.nn.Module, input_ids: Tensor) -> Tensor:
    """Return fp32 [rows, 2, V], or [rows, 1, C] row by row, since some families have no padding token for batches."""
    if is_classifier(model):
        return torch.cat([model(input_ids=row[None]).logits for row in input_ids])[:, None].float().cpu()
    logits = model(input_ids=input_ids, use_cache=False).logits
    return logits[:, -PROBE_POSITIONS:].float().cpu()


def _nudged_logits(model: torch.nn.Module, input_ids: Tensor, *, seed: int) -> Tensor:
    """Return the logits with random rounding in every adapted linear."""
    random = torch.Generator().manual_seed(seed)
    linears = [module for module in model.modules() if isinstance(module, LoraLayer)]
    hooks = [linear.register_forward_hook(partial(_nudge, random=random)) for linear in linears]
    try:
        return _last_logits(model, input_ids)
    finally:
        for hook in hooks:
            hook.remove()


def _nudge(_linear: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor, *, random: torch.Generator) -> Tensor:
    """Multiply each element by 1 + u·eps, u uniform in [-1/2, 1/2), in fp64, then round."""
    half_units = torch.rand(output.shape, generator=random, dtype=torch.float64) - 0.5
    factor = 1 + half_units * torch.finfo(output.dtype).eps
    return (output.double() * factor.to(output.device)).to(output.dtype)


def _stepped_logits(model: torch.nn.Module, input_ids: Tensor, *, seed: int) -> Tensor:
    """Return the logits if one input of every token is off by a step in each linear that rounds to LEVELS."""
    random = torch.Generator().manual_seed(seed)
    linears = [module for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    hooks = [linear.register_forward_pre_hook(partial(_step, random=random)) for linear in linears]
    try:
        return _last_logits(model, input_ids)
    finally:
        for hook in hooks:
            hook.remove()


def _step(_linear: torch.nn.Module, inputs: tuple[Tensor, ...], *, random: torch.Generator) -> tuple[Tensor, ...]:
    x, *rest = inputs
    places = torch.randint(x.shape[-1], (*x.shape[:-1], 1), generator=random)
    signs = 2.0 * torch.randint(2, places.shape, generator=random) - 1
    steps = x.abs().amax(-1, keepdim=True) / LEVELS * signs.to(x)
    return x.scatter_add(-1, places.to(x.device), steps), *rest


@contextmanager
def _adapted(model: torch.nn.Module, directory: Path, *, device: str, in_fp32: bool = True) -> Iterator[PeftModel]:
    """Attach the adapter to the base model's modules with PEFT, on `device`, even if the weights are offloaded."""
    with restored(model):
        adapted = None
        try:
            adapted = _load_adapter(model, directory, in_fp32=in_fp32)
            _bring(adapted, device)
            yield adapted
        finally:
            if adapted is not None:
                adapted.unload()


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Restore the modules and attributes of a base model after the block, also if PEFT fails in it halfway.

    Packmates keep using this base model.
    """
    own, attributes = dict(model.named_modules()), set(vars(model))
    try:
        yield
    finally:
        for path, module in own.items():  # outer modules first
            if path and model.get_submodule(path) is not module:
                model.set_submodule(path, module)
        for name in vars(model).keys() - attributes:
            delattr(model, name)


def _bring(adapted: PeftModel, device: str) -> None:
    """Move the adapter to `device`. PEFT places it next to the weight that it adapts, possibly in host memory."""
    layers = (layer for layer in adapted.modules() if isinstance(layer, LoraLayer))
    for part in (getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names):
        if isinstance(part, torch.nn.Module):
            part.to(device)


def _load_adapter(model: torch.nn.Module, directory: Path, *, in_fp32: bool = True) -> PeftModel:
    """Load with PEFT. By its default, which `in_fp32` keeps, adapter weights are cast to fp32."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT calls deprecated functions of transformers
            return PeftModel.from_pretrained(
                model, str(directory), is_trainable=False, autocast_adapter_dtype=in_fp32
            ).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if is_shortage(error) or is_device_fault(error):
            raise
        raise _bad(f"PEFT can't load it: {error}") from error


def _load_probe(base: BaseModel, directory: Path) -> dict[str, Tensor]:
    """Load the probe to the CPU, where logits are compared."""
    for name in (CONFIG, WEIGHTS, PROBE):
        if not (directory / name).is_file():
            raise _bad(f"{name} is missing")
    refuse_foreign_code(directory)
    try:
        read_header(directory / WEIGHTS)
        header = read_header(directory / PROBE)
    except UnsafeFile as error:
        raise _bad(error.message.removesuffix(".")) from error
    named = {name for name in header if not name.startswith((verification_linears.PREFIX, verification_modules.PREFIX))}
    if named != {"input_ids", "logits", "base_logits"} or _is_foreign(base, header):
        raise _bad(f"{PROBE} belongs to another base model or has an unknown format")
    return load_file(directory / PROBE)


def _is_foreign(base: BaseModel, header: dict) -> bool:
    """Return whether the logits can't belong to this base model. A job's own head may have any number of classes."""
    return base.task == "causal-lm" and header["logits"][1][-1] != base.vocab_size


@contextmanager
def _with_head(base: BaseModel, directory: Path) -> Iterator[None]:
    """Replace the head of a classifier by the exported adapter's, which has the job's number of classes."""
    head = task_head_of(base.model)
    if head is None:
        yield
        return
    tensors = load_file(directory / WEIGHTS)
    own = {name.removeprefix(PREFIX): tensor.to(base.device) for name, tensor in tensors.items()}
    before = base.model.get_submodule(head.path)
    base.model.set_submodule(head.path, own_head(base.model, own, path=head.path).requires_grad_(False))
    try:
        yield
    finally:
        base.model.set_submodule(head.path, before)


def is_classifier(model: torch.nn.Module) -> bool:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return task_head_of(inner) is not None


def refuse_foreign_code(directory: Path) -> None:
    """Reject configurations that name classes to import (PEFT's auto_mapping). Raises BadAdapter."""
    try:
        config = json.loads((directory / CONFIG).read_text())
    except (ValueError, RecursionError) as error:
        raise _bad(f"{CONFIG} is not valid JSON") from error
    if not isinstance(config, dict) or config.get("auto_mapping") or config.get("peft_type") != "LORA":
        raise _bad(f"{CONFIG} does not describe a plain LoRA adapter")


def _bad(reason: str) -> BadAdapter:
    return BadAdapter(f"The exported adapter is invalid: {reason}.", remedy="Export the job's adapter again.")


def unverifiable(error: Exception) -> BadAdapter:
    """Return the error for an adapter whose verification failed with an exception."""
    return BadAdapter(
        f"The adapter could not be exported and verified ({type(error).__name__}: {error}).",
        remedy="If the loss diverged, lower the learning rate. Otherwise check the worker's log.",
    )

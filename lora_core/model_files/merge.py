# pyright: basic
"""Merges an adapter into its base model: writes W + scale · B A as a complete model folder, and measures rounding.

`python -m lora_core.model_files.merge ADAPTER BASE OUT`. The sum is computed in fp32 and rounded once to the base
model's dtype, one linear at a time. The folder is only created if its logits equal those of base model and adapter.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn

from lora_core.base_model.loading import read_config
from lora_core.base_model.model import BaseModel, load_base
from lora_core.base_model.quantization import Quantization, quantization_in_training
from lora_core.errors import BadAdapter, LoraCoreError, UnsafeFile, UnsupportedModel
from lora_core.model_files.import_base import import_base
from lora_core.model_files.merge_cost import compare_cost
from lora_core.peft_format.export import CONFIG, PROBE, WEIGHTS, pseudo_random_ids
from lora_core.peft_format.verify import NUM_NUDGES, ROUNDING_FACTOR, refuse_foreign_code, verify_export
from lora_core.runtime.safetensors_io import read_header, write_directory, write_json

PROBE_SEED = 20_260_102
DEQUANTIZE_HELP = "store 16 bits if the GGUF file, or the base model in training, is quantized (loses precision)"
MEASURE_HELP = "time a pass of the base and of the merged model; reads a GGUF file twice"
RECORD = "merge.json"
PULL_AGAIN = "Pull the adapter again into a new folder with `lorry adapters pull`."
PLAIN_TENSORS = {"F32", "F16", "BF16", "F64"}
TEMPLATES = "additional_chat_templates"
"""Folder of the templates that have a name."""
SHARD = "5GB"
NUM_INPUTS = 16
"""Random inputs by which a merged layer is compared with the adapted one."""
MAX_UPDATE_ERROR = 0.01
"""Highest error of a layer's update, as a fraction of the update, before it is rounded to the dtype of the base."""
ROUNDING_UNITS = 32
"""Rounding errors of a layer's outputs in fp32, in units in the last place. Sums in another order differ by less."""

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """Effect of merging, in logits, over every position of pseudo-random sequences.

    `max_abs_diff` is the largest difference between merged and adapted model, `tolerance` the part that rounding
    to `dtype` explains, and `max_abs_effect` the largest change by the adapter. `update_error` is the Frobenius norm of
    the rounding errors over that of B A, for all linears together: 0 in fp32, 1 if as much was lost as was added.
    """

    dtype: Dtype
    num_merged: int
    max_abs_diff: float
    tolerance: float
    max_abs_effect: float
    update_error: float
    adapter_sha256: str
    dequantized: bool
    trained_on: Quantization = "none"
    """Quantization of the base model in training, if the adapter's folder contains it."""
    max_abs_diff_to_trained: float | None = None
    """Difference to the logits in training, for an adapter trained on a quantized base model. None without a probe."""


def merge_adapter(
    adapter_dir: Path,
    base_source: Path,
    out_dir: Path,
    *,
    dtype: Dtype | None = None,
    dequantize: bool = False,
    end_ids: Collection[int] = (),
) -> MergeReport:
    """Write `out_dir`, which must not exist: config, tokenizer, sharded weights and merge.json.

    Args:
        base_source: A base folder or a GGUF file.
        dtype: Dtype of the merged weights. None means that of the base model.
        dequantize: Accept the rounding errors of a quantized GGUF file, or of an adapter trained on a quantized base
            model.
        end_ids: Tokens that end an answer, for generation_config.json. Empty: those of the base model's files.

    Raises:
        BadAdapter: The adapter belongs to another base model, or the merged logits differ by more than rounding.
        UnsupportedModel: The base model is quantized, or was in training, and `dequantize` is not set.
    """
    refuse_foreign_adapter(adapter_dir)
    trained_on = quantization_in_training(adapter_dir / WEIGHTS)
    if trained_on != "none" and not dequantize:
        raise UnsupportedModel(
            f"The adapter was trained on a base model with {trained_on} quantization, so merging it into weights "
            "without quantization changes its output.",
            remedy=f"Serve it on the base model in {trained_on}, or pass --dequantize, which measures the difference.",
        )
    with _base_folder(base_source, dequantize=dequantize) as (base_dir, was_quantized):
        stored = stored_dtype(base_dir)
        base = load_base(base_dir, dtype=dtype or stored, device="cpu")
        _refuse_other_base(base if trained_on == "none" else _loaded_as(base_dir, trained_on, base), adapter_dir)
        to_trained = None if trained_on == "none" else _diff_to_trained(base, adapter_dir)
        model = cast(nn.Module, base.model)
        ids = torch.from_numpy(pseudo_random_ids(base, "merge", PROBE_SEED))
        with torch.no_grad():
            plain_logits = _logits(model, ids)
            adapted = _load(model, adapter_dir)
            adapted_logits = _logits(adapted, ids)
            layers = _lora_layers(adapted, model)
            update_error = _merge(layers)
            merged_logits = _logits(adapted, ids)
            roundings = [_nudged(layers, lambda: _logits(adapted, ids), seed=seed) for seed in range(NUM_NUDGES)]
            merged = _unloaded(adapted)
        report = MergeReport(
            dtype=dtype or stored,
            num_merged=len(layers),
            max_abs_diff=_largest(merged_logits - adapted_logits),
            tolerance=_tolerance(merged_logits, roundings, base.dtype),
            max_abs_effect=_largest(adapted_logits - plain_logits),
            update_error=update_error,
            adapter_sha256=hashlib.sha256((adapter_dir / WEIGHTS).read_bytes()).hexdigest(),
            dequantized=was_quantized,
            trained_on=trained_on,
            max_abs_diff_to_trained=to_trained,
        )
        if not report.max_abs_diff <= report.tolerance:
            raise _bad(
                f"merged logits differ by {report.max_abs_diff:.3g}, but rounding explains only {report.tolerance:.3g}"
            )
        write_directory(out_dir, lambda directory: _write(merged, base_dir, directory, report, end_ids))
    return report


def stored_dtype(base_dir: Path) -> Dtype:
    """Return the dtype in which the weights of a base folder are stored."""
    return "float32" if read_config(base_dir).dtype == torch.float32 else "bfloat16"


def refuse_foreign_adapter(adapter_dir: Path) -> None:
    """Raise BadAdapter for a folder that isn't a plain LoRA adapter in PEFT's layout, or that would run code."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter_dir / name).is_file():
            raise _bad(f"{name} is missing", remedy="Use the folder of a pulled adapter or of PEFT's save_pretrained.")
    refuse_foreign_code(adapter_dir)
    _refuse_changed(adapter_dir)
    if json.loads((adapter_dir / CONFIG).read_text()).get("task_type") == "SEQ_CLS":
        raise _bad("it has a sequence classification head, which a base model's folder can't contain")
    try:
        read_header(adapter_dir / WEIGHTS)
    except UnsafeFile as error:
        raise _bad(error.message.removesuffix(".")) from error


def _refuse_changed(adapter_dir: Path) -> None:
    """Raise BadAdapter if files differ from the manifest of a pulled folder. See `lorry adapters verify`."""
    manifest = adapter_dir / "manifest.json"
    if not manifest.is_file():
        return
    try:
        digests = {str(entry["path"]): entry["digest"] for entry in json.loads(manifest.read_text("utf-8"))["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _bad("its manifest.json can't be read", remedy=PULL_AGAIN) from error
    for name in (CONFIG, WEIGHTS):
        if name in digests and hashlib.sha256((adapter_dir / name).read_bytes()).hexdigest() != digests[name]:
            raise _bad(f"{name} does not match its digest in manifest.json", remedy=PULL_AGAIN)


@contextmanager
def _base_folder(source: Path, *, dequantize: bool) -> Iterator[tuple[Path, bool]]:
    """Yield (folder of plain weights, whether they were quantized). A GGUF file is imported temporarily."""
    if source.is_dir():
        if getattr(read_config(source), "quantization_config", None) is not None:
            raise UnsupportedModel(
                f"The weights of {source.name!r} are quantized, so W + B A can't be stored in them.",
                remedy="Use the base model before quantization, and quantize the merged model.",
            )
        yield source, False
        return
    kinds = _quantized_kinds(source)
    if kinds and not dequantize:
        raise UnsupportedModel(
            f"{source.name!r} is quantized ({', '.join(kinds)}). Merging stores its weights in 16 bits: the folder "
            "grows, and quantizing it again loses some or all of the adapter's changes.",
            remedy="Merge into the model before quantization, or pass --dequantize.",
        )
    with tempfile.TemporaryDirectory() as folder:
        import_base(source=str(source), kind="gguf", revision=None, target_dir=Path(folder) / "base")
        yield Path(folder) / "base", bool(kinds)


def _quantized_kinds(gguf: Path) -> list[str]:
    from gguf import GGUFReader

    if not gguf.is_file():
        raise UnsupportedModel(
            f"The base model {str(gguf)!r} does not exist.", remedy="Pass a base folder or a GGUF file."
        )
    try:
        return sorted({tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors} - PLAIN_TENSORS)
    except ValueError as error:
        raise UnsupportedModel(
            f"{gguf.name!r} is not a GGUF file: {error}.", remedy="Pass a base folder or a GGUF file."
        ) from error


def _refuse_other_base(base: BaseModel, adapter_dir: Path) -> None:
    """Raise BadAdapter if the logits with or without adapter differ from those in training.

    The evidence is in the adapter's folder if Lorry wrote it. It is not used if the dtype differs, since rounding would
    differ too.
    """
    if not (adapter_dir / PROBE).is_file():
        return
    stored = {kind for kind, _ in read_header(adapter_dir / WEIGHTS).values()}
    if stored != {{torch.float32: "F32", torch.bfloat16: "BF16"}[base.dtype]}:
        return
    if not verify_export(base, adapter_dir).passed:
        raise _bad("on this base model it does not reproduce the logits of training")


def _loaded_as(base_dir: Path, quantization: Quantization, plain: BaseModel) -> BaseModel:
    """Load the base model as in training, to which the adapter's evidence belongs."""
    dtype = "float32" if plain.dtype == torch.float32 else "bfloat16"
    return load_base(base_dir, dtype=dtype, device="cpu", quantization=quantization)


def _diff_to_trained(base: BaseModel, adapter_dir: Path) -> float | None:
    """Return the difference to the evidence on the plain base model, in logits. None without a probe."""
    if not (adapter_dir / PROBE).is_file():
        return None
    return verify_export(base, adapter_dir).max_abs_diff


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _load(model: nn.Module, adapter_dir: Path) -> PeftModel:
    """Load the adapter with PEFT. Raises BadAdapter for weights that PEFT would only warn about."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=False).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _bad(f"PEFT can't load it: {error}") from error
    with safe_open(adapter_dir / WEIGHTS, framework="pt") as file:
        foreign = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() ^ set(file.keys()))
    if foreign:
        raise _bad(f"{foreign[0]} is missing, or does not exist in this base model")
    return adapted


def _lora_layers(adapted: PeftModel, model: nn.Module) -> list[LoraLayer]:
    """Return the adapted layers.

    Raises BadAdapter if an adapted layer, or one trained in full, shares its weight with another layer, because merging
    would change both.
    """
    layers: list[LoraLayer] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    parameters = list(model.named_parameters(remove_duplicate=False))
    owners = [parameter.data_ptr() for _, parameter in parameters]
    replaced = [module.original_module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    weights = [*map(_weight, layers), *(weight for module in replaced for weight in module.parameters())]
    for weight in weights:
        if owners.count(weight.data_ptr()) > 1:
            raise BadAdapter(
                "The adapter can't be merged: it changes the output head, whose weight this base model shares with its "
                "embeddings. A merged model would tie them again and differ from the trained one.",
                remedy="Serve the adapter on the base model with PEFT. To get a mergeable adapter, train without "
                "the head: remove it from modules_to_save and target_modules.",
            )
    return layers


def _weight(layer: LoraLayer) -> nn.Parameter:
    return cast(nn.Parameter, layer.get_base_layer().weight)


def _merge(layers: list[LoraLayer]) -> float:
    """Replace W by W + B A with PEFT's own rule for each method. Returns `update_error` (see MergeReport).

    PEFT would round B A to the dtype of W, and then the sum. A layer that is temporarily fp32 is rounded once. Before
    that, the merged layer must compute what the adapted one does, because rounding can hide errors in the logits.
    """
    added = lost = 0.0
    random = torch.Generator().manual_seed(PROBE_SEED)
    for layer in layers:
        weight = _weight(layer)
        before = weight.data
        layer.get_base_layer().float()
        module, inputs = cast(nn.Module, layer), _inputs(layer, random)
        adapted, plain = module(inputs), layer.get_base_layer()(inputs)
        try:
            layer.merge(safe_merge=True)  # creates a new tensor, so the memory-mapped file isn't modified
        except ValueError as error:
            raise _bad(f"{error}") from error
        _check_update(module(inputs) - plain, adapted - plain, scale=float(adapted.norm()))
        exact = weight.data
        layer.get_base_layer().to(before.dtype)
        added += float((exact - before.float()).double().square().sum())
        lost += float((exact - weight.data.float()).double().square().sum())
    return (lost / added) ** 0.5 if added else 0.0


def _inputs(layer: LoraLayer, random: torch.Generator) -> Tensor:
    """Return random inputs of a layer: fp32 [NUM_INPUTS, in], or token ids [NUM_INPUTS]."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (NUM_INPUTS,), generator=random)
    return torch.randn(NUM_INPUTS, cast(int, layer.in_features), generator=random)


def _check_update(merged: Tensor, adapted: Tensor, *, scale: float) -> None:
    """Compare what a merged layer adds to its base with what the adapter adds. Raises BadAdapter.

    scale: Frobenius norm of the layer's outputs, which are rounded in fp32.
    """
    error, size = float((merged - adapted).norm()), float(adapted.norm())
    allowed = MAX_UPDATE_ERROR * size + ROUNDING_UNITS * torch.finfo(torch.float32).eps * scale
    if not error <= allowed:
        raise _bad(
            f"a merged layer adds something else than the adapter: its outputs differ by {error:.3g}, but rounding "
            f"explains only {allowed:.3g}",
            remedy="Serve the adapter on the base model with PEFT, and report this as a bug of Lorry.",
        )


def _nudged(layers: list[LoraLayer], logits: Callable[[], Tensor], *, seed: int) -> Tensor:
    """Return the logits if every merged weight is off randomly by at most half a unit in its last place."""
    random = torch.Generator().manual_seed(seed)
    kept = [_weight(layer).data for layer in layers]
    for layer in layers:
        weight = _weight(layer)
        half_units = torch.rand(weight.shape, generator=random) - 0.5
        factor = 1 + half_units.double() * torch.finfo(weight.dtype).eps
        weight.data = (weight.data.double() * factor).to(weight.dtype)
    try:
        return logits()
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            _weight(layer).data = weight


def _tolerance(merged_logits: Tensor, nudged: list[Tensor], dtype: torch.dtype) -> float:
    """Return three times the effect of rounding on the logits, in bf16 one and a half times.

    That is half a unit in the last place of each merged weight, in the worst of three draws, and at least of the
    largest logit. As in verify.py, it is measured. In bf16 the drawn errors are rounded again, which makes them nearly
    twice as large as those of merging. In fp32, the order of the sums adds to them.
    """
    factor = ROUNDING_FACTOR if dtype == torch.float32 else ROUNDING_FACTOR / 2
    least = torch.finfo(dtype).eps * _largest(merged_logits) / 2
    return factor * max(least, *(_largest(logits - merged_logits) for logits in nudged))


def _unloaded(adapted: PeftModel) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the layers are already merged
        return cast(nn.Module, adapted.merge_and_unload())


def _write(merged: nn.Module, base_dir: Path, directory: Path, report: MergeReport, end_ids: Collection[int]) -> None:
    """Copy the base model's other files unchanged (tokenizer, template, license), then write config and weights."""
    for path in sorted(base_dir.iterdir()):
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json", ".gguf", ".bin", ".pt", ".py")):
            shutil.copyfile(path, directory / path.name)
    for path in sorted(base_dir.glob(f"{TEMPLATES}/*.jinja")):
        (directory / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, directory / TEMPLATES / path.name)
    merged.save_pretrained(directory, max_shard_size=SHARD)  # pyright: ignore[reportCallIssue]
    if end_ids:
        _write_end_ids(directory / "generation_config.json", end_ids)
    write_json(directory / RECORD, asdict(report))


def _write_end_ids(path: Path, end_ids: Collection[int]) -> None:
    """Set the tokens that end an answer in a generation_config.json. Those that it has come first."""
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    stated = content.get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    ends = sorted(end_ids, key=lambda ident: (listed.index(ident) if ident in listed else len(listed), ident))
    write_json(path, {**content, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def _largest(logits: Tensor) -> float:
    return float(logits.abs().max())


def _bad(reason: str, *, remedy: str = "Use a LoRA adapter that was trained on this base model.") -> BadAdapter:
    return BadAdapter(f"The adapter can't be merged: {reason}.", remedy=remedy)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lora_core.model_files.merge", description="Merge an adapter into its base."
    )
    parser.add_argument("adapter", type=Path, help="folder in PEFT's layout, for example from `lorry adapters pull`")
    parser.add_argument("base", type=Path, help="folder of safetensors, or a GGUF file")
    parser.add_argument("out", type=Path, help="folder to create; it must not exist")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="dtype of the merged weights (default: that of the base model)"
    )
    parser.add_argument("--dequantize", action="store_true", help=DEQUANTIZE_HELP)
    parser.add_argument("--measure", action="store_true", help=MEASURE_HELP)
    given = parser.parse_args(arguments)
    try:
        report = merge_adapter(given.adapter, given.base, given.out, dtype=given.dtype, dequantize=given.dequantize)
        answer: dict[str, object] = {"merged": asdict(report)}
        if given.measure:
            with _base_folder(given.base, dequantize=given.dequantize) as (base_dir, _):
                answer["cost"] = asdict(compare_cost(base_dir, given.out, dtype=report.dtype))
    except LoraCoreError as error:
        sys.stderr.write(f"{error.message} {error.remedy}\n")
        return 1
    except FileExistsError as error:
        sys.stderr.write(f"{error} exists already. Choose a folder that does not exist.\n")
        return 1
    sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

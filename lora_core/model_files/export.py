# pyright: basic
"""Exports a trained adapter in the format of a serving engine: merged weights, a GGUF model, or a GGUF LoRA file.

Each export is read back and compared with the adapted model before its folder appears.
"""

import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lora_core.base_model.loading import read_config
from lora_core.errors import UnsupportedModel
from lora_core.gguf_format.architecture import ARCHITECTURES, architecture_of
from lora_core.gguf_format.modelfile import write_modelfile
from lora_core.gguf_format.tokenizer import add_sentencepiece_model
from lora_core.gguf_format.verify import GgufReport, verify_gguf, verify_gguf_lora
from lora_core.gguf_format.verify_converted import verify_converted
from lora_core.gguf_format.write import Precision, write_gguf
from lora_core.gguf_format.write_lora import write_gguf_lora
from lora_core.model_files.merge import merge_adapter, refuse_foreign_adapter, stored_dtype
from lora_core.model_files.merge_cost import compare_cost
from lora_core.runtime.safetensors_io import write_directory, write_json

Format = Literal["merged", "gguf", "gguf-lora"]
Convert = Callable[[Path, Path], None]
"""Writes a model folder, the first path, as a GGUF file, the second one, which does not exist."""
RECORD = "export.json"


def export_model(
    adapter_dir: Path,
    base_dir: Path,
    out_dir: Path,
    *,
    format: Format,  # noqa: A002
    quantization: Precision | None,
    name: str,
    file_stem: str,
    end_ids: Collection[int] = (),
    convert: Convert | None = None,
) -> dict[str, Any]:
    """Create `out_dir`, which must not exist, and return what was measured.

    Args:
        adapter_dir: Folder in PEFT's layout.
        base_dir: Folder of the base model, with weights that are not quantized.
        quantization: Storage of the matrices, for the format `gguf` only.
        name: Name of the model in GGUF metadata.
        file_stem: Name of a GGUF file, without its suffix.
        end_ids: Tokens that end an answer; see `merge_adapter`. An export without a model does not contain them.
        convert: Writes GGUF files of the architectures that this package does not write. None: they are refused.

    Returns:
        `verification`: with `max_abs_diff` and `tolerance` in logits, and details by format. `cost`: the fields of
        `merge_cost.Cost`, or None for `gguf-lora`, which contains no model.

    Raises:
        BadAdapter: The logits differ by more than rounding explains.
        UnsupportedModel: The format can't represent the model or the adapter.
        OSError: For example, the disk is full.
    """
    if (quantization is not None) != (format == "gguf"):
        raise UnsupportedModel(
            f"The format {format!r} {'needs' if quantization is None else 'has no'} quantization.",
            remedy="Set quantization to 'f16' or 'q8_0' for the format 'gguf', and for no other one.",
        )
    refuse_foreign_adapter(adapter_dir)
    if format == "merged":
        return _export_merged(adapter_dir, base_dir, out_dir, end_ids)
    config = read_config(base_dir)
    if quantization is None or convert is None or config.model_type in ARCHITECTURES:
        architecture_of(config)
        convert = None
    if quantization is None:
        return _export_lora(adapter_dir, base_dir, out_dir, name=name, file_stem=file_stem)

    def write(merged: Path, path: Path) -> GgufReport:
        if convert is None:
            write_gguf(merged, path, precision=quantization, name=name)
            return verify_gguf(merged, path, precision=quantization)
        add_sentencepiece_model(merged, vocab_size=config.get_text_config().vocab_size)
        convert(merged, path)
        return verify_converted(merged, path)

    return _export_gguf(adapter_dir, base_dir, out_dir, write=write, file_stem=file_stem, end_ids=end_ids)


def _export_merged(adapter_dir: Path, base_dir: Path, out_dir: Path, end_ids: Collection[int]) -> dict[str, Any]:
    """merge_adapter compares the merged model in memory. Reading the folder again for the cost checks the files."""
    report = merge_adapter(adapter_dir, base_dir, out_dir, dequantize=True, end_ids=end_ids)
    cost = compare_cost(base_dir, out_dir, dtype=report.dtype)
    return {"verification": asdict(report), "cost": asdict(cost)}


def _export_gguf(
    adapter_dir: Path,
    base_dir: Path,
    out_dir: Path,
    *,
    write: Callable[[Path, Path], GgufReport],
    file_stem: str,
    end_ids: Collection[int],
) -> dict[str, Any]:
    """The weights are merged in fp32, so that they are rounded once, to the format of the file."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".merged-") as folder:
        merged = Path(folder) / "merged"
        report = merge_adapter(adapter_dir, base_dir, merged, dtype="float32", dequantize=True, end_ids=end_ids)
        cost = compare_cost(base_dir, merged, dtype=stored_dtype(base_dir))
        result: dict[str, Any] = {"cost": asdict(cost)}

        def fill(directory: Path) -> None:
            path = directory / f"{file_stem}.gguf"
            result["verification"] = {**asdict(write(merged, path)), "merge": asdict(report)}
            write_modelfile(merged, directory / "Modelfile", gguf_name=path.name)
            write_json(directory / RECORD, result)
            for license_file in sorted(base_dir.glob("LICENSE*")):
                shutil.copyfile(license_file, directory / license_file.name)

        write_directory(out_dir, fill)
    return result


def _export_lora(adapter_dir: Path, base_dir: Path, out_dir: Path, *, name: str, file_stem: str) -> dict[str, Any]:
    result: dict[str, Any] = {"cost": None}

    def fill(directory: Path) -> None:
        path = directory / f"{file_stem}.gguf"
        write_gguf_lora(adapter_dir, base_dir, path, name=name)
        result["verification"] = asdict(verify_gguf_lora(adapter_dir, base_dir, path))
        write_json(directory / RECORD, result)

    write_directory(out_dir, fill)
    return result

"""Compares an adapter with full fine-tuning of its base model. Pure.

The four numbers are those of the LoRA paper (arXiv 2106.09685, sections 1 and 4.2): trained parameters, size, memory in
training, and latency in inference. Except for the latency, they follow from the adapter's lineage record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from catalog.registry.lineage_comparison import WEIGHTS
from catalog.resources.memory import BYTES_PER_NUMBER, JOB_TOKENS, BaseModelMemory, JobMemory
from catalog.tables.table import Json

WEIGHT_FILES = (".safetensors",)
MOMENT_BYTES, GRADIENT_BYTES = 8, 4
"""Bytes per parameter of AdamW's two moments, and of a gradient in an adapter's state, all in fp32."""


def of_adapter(record: Mapping[str, Any], *, cost: Mapping[str, Any] | None = None) -> Json | None:
    """Return the four numbers of an adapter. None if the lineage record does not describe the base model.

    - `parameters`: `trainable`, `base` and their ratio, `share`.
    - `size`: `bytes` of the adapter's weights file, `base_bytes` of the base model's weight files, and `share`.
    - `training_memory`: see `training_memory`. None if the record does not contain the shapes of the base model.
    - `inference_latency`: see `inference_latency`.

    record: the adapter's lineage record. cost: of the adapter's newest export, if it was measured.
    """
    base: Json = record.get("base") or {}
    outputs: Json = record.get("outputs") or {}
    description: Json = base.get("description") or {}
    num_base, num_trained = description.get("num_parameters"), outputs.get("num_parameters")
    if not num_base or num_trained is None:
        return None
    num_bytes = sum(file["num_bytes"] for file in outputs.get("files", []) if file["path"] == WEIGHTS)
    base_bytes = sum(file["num_bytes"] for file in base.get("files", []) if file["path"].endswith(WEIGHT_FILES))
    return {
        "parameters": {"trainable": num_trained, "base": num_base, "share": num_trained / num_base},
        "size": {
            "bytes": num_bytes,
            "base_bytes": base_bytes or None,
            "share": num_bytes / base_bytes if base_bytes else None,
        },
        "training_memory": training_memory(record)
        if description.get("linear_shapes") and record.get("config")
        else None,
        "inference_latency": inference_latency(cost),
    }


def training_memory(record: Mapping[str, Any]) -> Json:
    """Return the memory of training in bytes: `lora`, `full_fine_tuning`, their `share`, and `measured`.

    `lora` and `full_fine_tuning` are computed. Each has these components and their `total`:

    - `weights`: the model in the precision of training, or quantized; for LoRA also the adapter in that precision.
    - `gradients`: of the trained parameters. In full fine-tuning they have the precision of training. Lorry keeps those
      of an adapter in fp32.
    - `optimizer_state`: AdamW's two moments in fp32, and the fp32 master weights if the precision is bfloat16. An
      adapter that was trained with another optimizer has the state of that one.
    - `activations`: of one tick with the tokens of one job, the same for both, plus the dequantized weights of a
      quantized base model. A larger batch adds the same amount to both.

    Full fine-tuning thus takes 16 bytes per parameter without activations, in bfloat16 (2 + 2 + 12) as in fp32 (4 + 4 +
    8): the rule of ZeRO (arXiv 1910.02054, section 3.1) for mixed precision with Adam. `measured` contains what the
    trainer reported before the export: `base_bytes`, `adapter_bytes` of all its jobs, and `peak_bytes` of its device,
    or of the process on a CPU. None if it reported nothing.
    """
    spec: Json = record["config"]["resolved"]
    description, precision = record["base"]["description"], spec["precision"]
    quantization, num_trained = spec.get("quantization", "none"), record["outputs"]["num_parameters"]
    num_base, width = description["num_parameters"], BYTES_PER_NUMBER[precision]
    state = JobMemory.of_spec(spec, num_parameters=num_trained).row_bytes(precision)
    plain, base = BaseModelMemory(description, precision), BaseModelMemory(description, precision, quantization)
    lora = _summed(
        weights=base.weight_bytes() + width * num_trained,
        gradients=GRADIENT_BYTES * num_trained,
        optimizer_state=state - (width + GRADIENT_BYTES) * num_trained,
        activations=base.tick_bytes(JOB_TOKENS),
    )
    master_bytes = 0 if precision == "float32" else 4
    full = _summed(
        weights=width * num_base,
        gradients=width * num_base,
        optimizer_state=(MOMENT_BYTES + master_bytes) * num_base,
        activations=plain.tick_bytes(JOB_TOKENS),
    )
    return {
        "lora": lora,
        "full_fine_tuning": full,
        "share": lora["total"] / full["total"],
        "measured": record.get("results", {}).get("memory"),
    }


def inference_latency(cost: Mapping[str, Any] | None) -> Json | None:
    """Return the latency of the merged model compared with the base model; None if it was not measured.

    cost: `base_seconds` and `merged_seconds` of a pass, as an export measures them.
    """
    if cost is None:
        return None
    base, merged = float(cost["base_seconds"]), float(cost["merged_seconds"])
    return {"base_seconds": base, "merged_seconds": merged, "ratio": merged / base}


def _summed(**components: int) -> Json:
    return {**components, "total": sum(components.values())}

"""The model card of an adapter or of its export: a README.md with the metadata of the Hugging Face Hub.

The card of an adapter is a function of the lineage record, which contains no training data, no secrets and no host
paths. It omits times, ids and measured memory, so equal trainings have equal cards. The card of an export also has what
the export measured.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from catalog.registry import efficiency
from catalog.resources.memory import readable
from catalog.serving import servability
from catalog.spec.job import JobSpec
from catalog.tables.table import Json

NAME = "README.md"
SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~!&])")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
FOLDER = "ADAPTER_FOLDER"
BASE = "BASE_MODEL"
MERGED = "MODEL_FOLDER"
EXPORTS = {
    "merged": ("Merged model", "the base model with this adapter merged into its weights", "transformers", "finetune"),
    "gguf": ("GGUF model", "the base model with this adapter merged into its weights", "gguf", "finetune"),
    "gguf-lora": (
        "GGUF LoRA file",
        "the matrices of this adapter, for a GGUF file of the base model",
        "gguf",
        "adapter",
    ),
}
"""For each format: the title, the contents, and library and relation in the Hub's metadata."""
LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "gpl-3.0", "unknown"),
        *("bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc0-1.0"),
        *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma"),
    }
)
"""Licenses that the Hub knows and that base models have. For any other, the Hub requires `other` and a name."""
METHODS = {
    "supervised": "supervised fine-tuning",
    "dpo": "DPO",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "kto": "KTO",
}


def render(record: Mapping[str, Any]) -> bytes:
    """Return the card of the adapter that the lineage record describes, in UTF-8."""
    spec = JobSpec.model_validate(record["config"]["resolved"])
    base: Json = record["base"]
    title = f"# LoRA adapter for {_escaped(hub_id(base) or base['name'])}"
    introduction = (
        f"Lorry trained this adapter with {METHODS.get(spec.method, spec.method)}. The folder has the layout of PEFT. "
        "`lineage.json` in a pulled folder is the signed record of its origin, and names the base model, the data and "
        "the configuration by SHA-256 digest."
    )
    parts = [
        *("---", *_metadata(base, library="peft", relation="adapter"), "---", "", title, "", introduction, ""),
        *_facts(record, spec),
        *_usage(base, spec),
    ]
    return _encoded(parts)


def render_export(
    record: Mapping[str, Any],
    *,
    format: str,  # noqa: A002
    gguf_name: str,
    verification: Mapping[str, Any],
    cost: Mapping[str, Any] | None,
) -> bytes:
    """Return the card of an export, in UTF-8.

    record: the adapter's lineage record. format: merged, gguf or gguf-lora. gguf_name: the name of the GGUF file.
    verification, cost: what the export measured. cost: None for gguf-lora, which contains no model.
    """
    spec = JobSpec.model_validate(record["config"]["resolved"])
    base: Json = record["base"]
    name, contents, library, relation = EXPORTS[format]
    title = f"# {name} of a LoRA adapter for {_escaped(hub_id(base) or base['name'])}"
    introduction = (
        f"Lorry trained an adapter with {METHODS.get(spec.method, spec.method)}. This export contains {contents}."
    )
    parts = [
        *("---", *_metadata(base, library=library, relation=relation), "---", "", title, "", introduction, ""),
        *_facts(record, spec, cost=cost),
        *_table("Verification of this export", _verification(verification)),
        *("## How to load it", "", *_usage_of_export(format, gguf_name, spec)),
    ]
    return _encoded(parts)


def _facts(record: Mapping[str, Any], spec: JobSpec, *, cost: Mapping[str, Any] | None = None) -> Iterator[str]:
    yield from _table("Training", _training(record, spec))
    yield from _table("Results", _results(record["results"]))
    yield from _table("Compared with full fine-tuning", _efficiency(record, cost))


def _encoded(parts: list[str]) -> bytes:
    return ("\n".join(parts).rstrip("\n") + "\n").encode()


def hub_id(base: Mapping[str, Any]) -> str | None:
    """Return the base model's id on the Hub, from its part of a lineage record. None if it has another source."""
    source = base.get("source") if base["kind"] == "hub" else None
    return None if source is None else CONTROL.sub(" ", source)


def _metadata(base: Mapping[str, Any], *, library: str, relation: str) -> Iterator[str]:
    """Yield the lines of the front matter. A JSON string is a YAML string."""
    if (source := hub_id(base)) is not None:
        yield f"base_model: {_quoted(source)}"
        yield f"base_model_relation: {relation}"
    yield f"library_name: {library}"
    if license_name := base.get("license"):
        known = license_name.lower()
        yield f"license: {known}" if known in LICENSES else f"license: other\nlicense_name: {_quoted(license_name)}"
    yield "pipeline_tag: text-generation"
    yield "tags:\n- lora\n- lorry"


def _training(record: Mapping[str, Any], spec: JobSpec) -> Iterator[tuple[str, object]]:
    base, lora, results = record["base"], spec.lora, record["results"]
    yield "Base model", hub_id(base) or f"{base['name']} (its name in Lorry)"
    yield "Revision of the base model", base.get("revision") if hub_id(base) else None
    yield "SHA-256 digest of the base model's manifest", base.get("digest")
    yield "Precision", spec.precision
    yield "Quantization of the base model", None if spec.quantization == "none" else spec.quantization
    yield "Method", METHODS.get(spec.method, spec.method)
    yield "Rank, alpha, dropout", f"{lora.rank}, {lora.alpha:g}, {lora.dropout:g}"
    variants = {"DoRA": lora.use_dora, "rsLoRA": lora.use_rslora}
    yield "Variants", ", ".join(name for name, is_used in variants.items() if is_used)
    yield "Initialization", None if lora.init_lora_weights == "default" else lora.init_lora_weights
    yield (
        "Adapted layers",
        lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules),
    )
    yield "Optimizer steps", results.get("steps")
    yield "Weights of step", results.get("kept_step")
    yield "Batch size", spec.batch_size
    yield "Optimizer", spec.optimizer.type
    yield "Peak learning rate", f"{spec.optimizer.learning_rate:g}"
    yield "Learning rate schedule", spec.schedule.type
    yield "Maximum tokens of a row", f"{spec.max_length:,}"
    yield "Trained tokens", f"{results['trained_tokens']:,}" if results.get("trained_tokens") is not None else None
    yield "Seed", spec.seed
    code: Json = record.get("code") or {}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in sorted(code.items()))


def _results(results: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    evaluation: Json = results.get("evaluation") or {}
    check: Json = results.get("verification") or {}
    began = "parent" if "parent_loss" in evaluation else "base"
    before = "parent adapter" if began == "parent" else "base model"
    for label, name in (
        ("Validation loss", "loss"),
        ("Perplexity", "perplexity"),
        ("Token accuracy", "token_accuracy"),
    ):
        if evaluation.get(name) is not None:
            first = evaluation.get(f"{began}_{name}")
            yield label, f"{evaluation[name]:.4g}" + (f" ({before}: {first:.4g})" if first is not None else "")
    if check.get("passed") is not None:
        yield "PEFT reproduces the logits of training", "yes" if check["passed"] else "no"
        yield "Largest difference of a logit", _number(check.get("max_abs_diff"))
        yield "Allowed difference", _number(check.get("tolerance"))
    yield "Determinism level", results.get("determinism")


def _efficiency(record: Mapping[str, Any], cost: Mapping[str, Any] | None) -> Iterator[tuple[str, object]]:
    found, latency = efficiency.of_adapter(record, cost=cost), efficiency.inference_latency(cost)
    if cost is not None and latency is not None:
        merged, base = (f"{1000 * latency[f'{name}_seconds']:.3g} ms" for name in ("merged", "base"))
        of_pass = f"for a pass over {cost['num_tokens']} tokens on a CPU"
        yield "Inference latency, merged", f"{merged} instead of {base} ({percent(latency['ratio'])}), {of_pass}"
    if found is None:
        return
    parameters, size, usage = found["parameters"], found["size"], found["training_memory"]
    yield (
        "Trained parameters",
        f"{parameters['trainable']:,} of {parameters['base']:,} ({percent(parameters['share'])})",
    )
    if size["share"] is not None:
        whole = readable(size["base_bytes"])
        yield "Size of the weights", f"{readable(size['bytes'])} of {whole} ({percent(size['share'])})"
    if usage is not None:
        lora, full = usage["lora"], usage["full_fine_tuning"]
        yield "Training memory, computed", f"{_of(lora, full, 'total')} ({percent(usage['share'])})"
        for name in ("weights", "gradients", "optimizer_state", "activations"):
            yield f"Memory: {name.replace('_', ' ')}", _of(lora, full, name)
    if latency is None:
        yield "Inference, merged", "the layers and operations of the base model"


def _of(lora: Mapping[str, int], full: Mapping[str, int], name: str) -> str:
    return f"{readable(lora[name])} instead of {readable(full[name])}"


def percent(share: float) -> str:
    """Return a share with two significant digits."""
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def _usage(base: Mapping[str, Any], spec: JobSpec) -> Iterator[str]:
    source = hub_id(base)
    revision: str | None = base.get("revision") if source is not None else None
    how = f", revision={_quoted(revision)}" if revision else ""
    yield from ("## How to load it", "")
    if source is None:
        yield from (f"`{BASE}` is the folder or the Hub ID of the base model.", "")
    classes = "AutoModelForCausalLM"
    if spec.quantization != "none":
        yield from (f"The base model is loaded with the quantization {spec.quantization}, as in training.", "")
        classes += ", BitsAndBytesConfig"
    options = _loading_options(spec)
    yield from (
        "```python",
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {classes}",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({_quoted(source or BASE)}{how}, {options})",
        f'model = PeftModel.from_pretrained(base, "{FOLDER}")',
        "```",
        "",
    )
    yield from _usage_with_vllm(base, spec)


def _loading_options(spec: JobSpec) -> str:
    """Return the arguments with which Transformers loads the base model as in training."""
    dtype = f"torch.{spec.precision}"
    how = {
        "nf4": f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
        f"bnb_4bit_compute_dtype={dtype}",
        "int8": "load_in_8bit=True, llm_int8_threshold=0.0",
    }.get(spec.quantization)
    return f"dtype={dtype}" + (f", quantization_config=BitsAndBytesConfig({how})" if how else "")


def _usage_with_vllm(base: Mapping[str, Any], spec: JobSpec) -> Iterator[str]:
    description: Json = base.get("description") or {}
    architecture: str | None = description.get("architecture")
    ranks = [spec.lora.rank, *spec.lora.rank_pattern.values()]
    answer = servability.of_job(spec, ranks, architecture=architecture)["vllm"]
    reasons = answer.reasons
    if answer.verdict == "no":
        reasons = tuple(reason for reason in reasons if not reason.startswith("Start vLLM"))
    yield from ("With vLLM:" if answer.verdict != "no" else "vLLM can't load it:", "")
    yield from (f"- {_escaped(reason)}" for reason in reasons)
    if reasons:
        yield ""
    if answer.verdict != "no":
        source = hub_id(base)
        revision: str | None = base.get("revision") if source is not None else None
        flags = f" --revision {shlex.quote(CONTROL.sub(' ', revision))}" if revision else ""
        flags += " --quantization bitsandbytes" if spec.quantization == "nf4" else ""
        highest = servability.vllm_rank(servability.exported_rank(spec))
        flags += f" --enable-lora --max-lora-rank {highest} --lora-modules NAME={FOLDER}"
        yield from ("```sh", f"vllm serve {shlex.quote(source or BASE)}{flags}", "```")


def _verification(verification: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "Largest difference of a logit", _number(verification.get("max_abs_diff"))
    yield "Difference that rounding explains", _number(verification.get("tolerance"))
    yield "Comparison", verification.get("explanation")


def _usage_of_export(format: str, gguf_name: str, spec: JobSpec) -> Iterator[str]:  # noqa: A002
    if format == "merged":
        model = f'AutoModelForCausalLM.from_pretrained("{MERGED}", dtype=torch.{spec.precision})'
        yield from ("```python", "import torch", "from transformers import AutoModelForCausalLM", "")
        yield from (f"model = {model}", "```", "", "With vLLM:", "", "```sh", f"vllm serve {MERGED}", "```")
        return
    file = shlex.quote(gguf_name)
    model = f"--model {file}" if format == "gguf" else f"--model BASE_MODEL.gguf --lora {file}"
    yield from ("With llama.cpp:", "", "```sh", f"llama-server {model}", "```")


def _table(title: str, rows: Iterator[tuple[str, object]]) -> Iterator[str]:
    """Yield a section with a table of the rows that have a value."""
    shown = [(name, value) for name, value in rows if value not in (None, "")]
    if shown:
        yield from (f"## {title}", "", "| | |", "|---|---|")
        yield from (f"| {name} | {_escaped(str(value))} |" for name, value in shown)
        yield ""


def _escaped(text: str) -> str:
    """Return the text so that Markdown shows it unchanged, on one line."""
    return SPECIAL.sub(r"\\\1", CONTROL.sub(" ", text))


def _quoted(text: str) -> str:
    """Return the text as a string of JSON, which is also one of YAML and of Python."""
    return json.dumps(CONTROL.sub(" ", text), ensure_ascii=False)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"

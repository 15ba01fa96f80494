"""Prints the commands that load or serve a downloaded adapter or export."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.cli.render import output

if TYPE_CHECKING:
    from lorry.models import Adapter, AdapterExport, Model

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's option --max-lora-rank."""
VLLM_WITHOUT_LORA = frozenset(
    {"GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM", "HrmTextForCausalLM", "StableLmForCausalLM"}
)
"""Classes of base models for which vLLM loads no adapters, as in catalog.serving.servability."""
GGUF_ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Classes of base models that can be exported as GGUF, as in catalog.exports.formats."""


def print_adapter_usage(folder: Path, adapter: Adapter, base: Model | None) -> None:
    """Print how to use a pulled adapter. base: None if the base model was deleted."""
    source = _source_of(base)
    where = "BASE" if source is None else source
    output.echo("Load it with PEFT:")
    output.echo(f"  base = AutoModelForCausalLM.from_pretrained({where}, {loading_options(adapter)})")
    output.echo(f"  model = PeftModel.from_pretrained(base, {json.dumps(str(folder), ensure_ascii=False)})")
    output.echo("Serve it with vLLM on a GPU:")
    output.echo(f"  {_vllm_command(folder, adapter, base)}")
    if base is not None and _can_be_gguf(base):
        gguf = f"{folder}-gguf"
        output.echo("Run it with llama.cpp or Ollama:")
        output.echo(f"  lorry adapters export {shlex.quote(adapter.name)} --format gguf --to {shlex.quote(gguf)}")
        output.echo(f"  llama-server --model {shlex.quote(gguf)}/*.gguf --port 8080")
        _print_ollama_commands(gguf, _model_name(adapter.name))
    if source is None:
        output.echo(f"BASE is the folder or Hub ID of {adapter.base_model}.")


def print_export_usage(folder: Path, export: AdapterExport) -> None:
    """Print how to use a downloaded export."""
    where = shlex.quote(str(folder))
    gguf = next((shlex.quote(str(path)) for path in sorted(folder.glob("*.gguf"))), "")
    name = _model_name(export.adapter_name)
    if export.format == "merged":
        loaded = json.dumps(str(folder), ensure_ascii=False)
        output.echo("Load it with Transformers:")
        output.echo(f'  model = AutoModelForCausalLM.from_pretrained({loaded}, dtype="auto")')
        output.echo("Serve it with vLLM on a GPU:")
        output.echo(f"  vllm serve {where} --served-model-name {name}")
    elif export.format == "gguf":
        output.echo("Run it with llama.cpp:")
        output.echo(f"  llama-cli --model {gguf}")
        output.echo(f"  llama-server --model {gguf} --port 8080")
        output.echo("Run it with Ollama:")
        _print_ollama_commands(str(folder), name)
        if not re.search(r"^TEMPLATE\b", (folder / "Modelfile").read_text("utf-8"), re.MULTILINE):
            output.echo("The Modelfile has no TEMPLATE, and Ollama may find none. Check it after `ollama create`:")
            output.echo(f"  ollama show {name} --template")
    else:
        output.echo("Make a GGUF file of the base model from its folder, with a script of llama.cpp:")
        output.echo("  python convert_hf_to_gguf.py FOLDER --outfile BASE.gguf")
        output.echo("Run both with llama.cpp:")
        output.echo(f"  llama-cli --model BASE.gguf --lora {gguf}")
        output.echo(f"  llama-server --model BASE.gguf --lora {gguf} --port 8080")


def _print_ollama_commands(folder: str, name: str) -> None:
    """Print how Ollama creates and runs a model. folder: that of an export as GGUF."""
    output.echo(f"  ollama create {name} --file {shlex.quote(f'{folder}/Modelfile')}")
    output.echo(f"  ollama run {name}")


def _source_of(base: Model | None) -> str | None:
    """Return the arguments with which Transformers loads the base model: a local folder or a Hub ID.

    None if the base model was deleted, or if its source is visible only to operators. adapter_config.json then contains
    Lorry's own name, which Transformers can't load.
    """
    if base is None:
        return None
    if base.local_path and Path(base.local_path).is_dir():
        return json.dumps(base.local_path, ensure_ascii=False)
    if not base.source or base.source.startswith("/"):
        return None
    revision = f", revision={json.dumps(base.revision)}" if base.revision else ""
    return json.dumps(base.source) + revision


def _can_be_gguf(base: Model) -> bool:
    """Return whether the service accepts an export as GGUF. It also accepts a base model without a known class."""
    return _architecture(base) in {None, *GGUF_ARCHITECTURES}


def _architecture(base: Model) -> str | None:
    return (base.description or {}).get("architecture")


def _vllm_command(folder: Path, adapter: Adapter, base: Model | None) -> str:
    """Return the command, or the reason why vLLM can't load the adapter and what to do instead."""
    source = _source_of(base)
    merged = f"lorry adapters export {shlex.quote(adapter.name)} --format merged"
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_bytes())
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        return f"{merged}   # vLLM can't load this kind of adapter, but the merged model"
    if base is not None and (architecture := _architecture(base)) in VLLM_WITHOUT_LORA:
        return f"{merged}   # vLLM loads no adapters for {architecture}, but the merged model"
    if adapter.quantization == "int8":
        return f"{merged}   # vLLM has no int8 format like that of the training"
    rank = next((limit for limit in VLLM_RANKS if limit >= int(config.get("r") or 1)), None)
    if rank is None:
        return f"{merged}   # vLLM loads no adapter of a rank above {VLLM_RANKS[-1]}"
    where = "BASE" if source is None else _shell_words(source)
    quantized = " --quantization bitsandbytes" if adapter.quantization == "nf4" else ""
    module = f"adapter={folder}"
    return f"vllm serve {where}{quantized} --enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(module)}"


def _shell_words(source: str) -> str:
    """Return the Python arguments `"SOURCE"` or `"SOURCE", revision="REVISION"` as words of a command."""
    name, _, revision = source.partition(", revision=")
    words = [shlex.quote(json.loads(name))]
    if revision:
        words += ["--revision", shlex.quote(json.loads(revision))]
    return " ".join(words)


def _model_name(adapter_name: str) -> str:
    """Return the suffix of the adapter's name, or else the id of its job in it, as a name for a server."""
    parts = [part for part in adapter_name.split(":")[3:5] if part]
    return shlex.quote(parts[0].lower()) if parts else "adapter"


def loading_options(adapter: Adapter) -> str:
    """Return the arguments with which Transformers loads the base model as in training."""
    dtype = f"torch.{adapter.precision or 'bfloat16'}"
    how = {
        "nf4": f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
        f"bnb_4bit_compute_dtype={dtype}",
        "int8": "load_in_8bit=True, llm_int8_threshold=0.0",
    }.get(adapter.quantization or "none")
    return f"dtype={dtype}" + (f", quantization_config=BitsAndBytesConfig({how})" if how else "")

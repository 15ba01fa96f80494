"""Exports by llama.cpp's converter: only a file with the values of the merged model passes. The converter is replaced,
except in the slow test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from lora_core.gguf_format.tokenizer import add_sentencepiece_model
from tests.lora_core.gguf_format import gemma
from tests.services import llama_cpp
from tests.services.programs import Missing
from tests.worker.process.test_gguf_converter import install
from worker.children.exporter import export
from worker.process import gguf_converter, sandbox
from worker.process.launcher import run_child

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = (
    "What color is the lorry?",
    "  Two  spaces,\n\na \u00e4 and \u65e5\u672c",
    "<start_of_turn>user\nred<end_of_turn>",
)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma.save(tmp_path_factory.mktemp("gemma") / "base")


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), lora).save_pretrained(str(folder))
    return folder


def exported(
    base_dir: Path, adapter_dir: Path, folder: Path, converter: Path | None, *, in_child: bool = False, **fields: Any
) -> dict[str, Any]:
    """Export as a worker does. Returns the result. in_child: in a child with its sandbox, which takes seconds more."""
    folder.mkdir(exist_ok=True)
    adapter = shutil.copytree(adapter_dir, folder / "adapter")
    arguments = {"adapter_dir": str(adapter), "base_dir": str(base_dir), "out_dir": str(folder / "out")}
    arguments |= {"format": "gguf", "quantization": "f16", "name": "ft:x", "file_stem": "ft-x"}
    arguments |= {"converter": None if converter is None else str(converter), "result": str(folder / "result.json")}
    (folder / "arguments.json").write_text(json.dumps(arguments | fields))
    if in_child:
        box, log_path = sandbox.export(folder, base_dir=base_dir, converter=converter), folder / "log.txt"
        child = run_child("worker.children.exporter", str(folder / "arguments.json"), log_path=log_path, box=box)
        assert child.wait() == 0, log_path.read_text()
    else:
        export(folder / "arguments.json")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert (folder / "out").exists() == ("error" not in result)
    return result


def test_export_states_what_was_compared(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    converter = install(tmp_path / "llama.cpp")

    result = exported(base_dir, adapter_dir, tmp_path / "work", converter, in_child=True)

    check = result["verification"]
    assert 0 < check["max_abs_diff"] <= check["tolerance"] < 0.01 * check["max_abs_logit"]
    assert check["explanation"] == (
        "llama.cpp's converter wrote this file. Its 93 tensors are the weights of the merged model, rounded to the "
        f"format. Rounding changes the logits by at most {check['max_abs_diff']:.3g}. The tokens, "
        "attention.head_count, attention.head_count_kv, rope.freq_base, attention.layer_norm_rms_epsilon are those of "
        "the base model. Other metadata was not compared, and Lorry did not run the file."
    )
    out = tmp_path / "work" / "out"
    assert json.loads((out / "export.json").read_text())["verification"] == check
    assert (out / "Modelfile").read_text().startswith("FROM ./ft-x.gguf\n")
    assert GGUFReader(out / "ft-x.gguf").fields["general.name"].contents() == "ft:x"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("weight", "model.layers.3.self_attn.q_proj.weight can't be found in it with the values of the merged model"),
        ("rows", "model.layers.3.self_attn.q_proj.weight can't be found in it with the values of the merged model"),
        ("norms", "norm.weight, "),
        ("missing norm", "model.norm.weight can't be found in it with the values of the merged model"),
        ("extra", "the merged model has no weight for its tensors output.weight"),
        ("tokens", "its token 383 is 'other', and that of the base model is"),
        ("fewer tokens", "it has 383 tokens, and the base model has 384"),
        ("no epsilon", "its metadata states None for attention.layer_norm_rms_epsilon"),
        ("key heads", "for attention.head_count_kv, and the model's config.json states"),
        ("metadata", "its metadata states 5 for attention.head_count, and the model's config.json states 4"),
    ],
)
def test_file_of_another_model_fails_the_export(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, fault: str, reason: str
) -> None:
    error = exported(base_dir, adapter_dir, tmp_path, install(tmp_path / "llama.cpp", fault=fault))["error"]

    assert error["code"] == "bad_adapter"
    assert "ft-x.gguf, which llama.cpp's converter wrote, can't be verified: " in error["message"]
    assert reason in error["message"]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("exit", "unsupported_model", "llama.cpp's converter can't write this model: ValueError: the weights are from"),
        ("nothing", "unsupported_model", "llama.cpp's converter can't write this model: it wrote no file."),
        ("memory", "export_failed", "needs more memory than the limit"),
    ],
)
def test_failure_of_the_converter_is_reported(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, fault: str, code: str, message: str
) -> None:
    error = exported(base_dir, adapter_dir, tmp_path, install(tmp_path / "llama.cpp", fault=fault))["error"]

    assert error["code"] == code
    assert message in error["message"]


def test_worker_without_converter_refuses_the_architecture(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    error = exported(base_dir, adapter_dir, tmp_path, None)["error"]

    assert "type 'gemma3_text' can't be exported as GGUF" in error["message"]


def test_tokenizer_model_has_the_tokens_and_the_order_of_the_merges(base_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_dir, folder)

    add_sentencepiece_model(folder, vocab_size=gemma.VOCABULARY + 2)

    sentencepiece: Any = import_protobuf()
    proto = sentencepiece.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    pieces = {piece.piece: (piece.type, piece.score) for piece in proto.pieces}
    assert [piece.piece for piece in proto.pieces[: gemma.VOCABULARY]] == sorted(model["vocab"], key=model["vocab"].get)
    kinds = [pieces[text][0] for text in ("<unk>", "<bos>", "<0x41>", "r", "[PAD385]")]
    assert kinds == [2, 3, 6, 1, 5], "unknown, control, byte, normal, unused"
    first, second = ("".join(model["merges"][order]) for order in (0, 1))
    assert pieces[first][1] > pieces[second][1] > pieces["r"][1]
    assert not proto.normalizer_spec.add_dummy_prefix


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
def test_llama_cpp_computes_the_logits_of_a_gemma_that_its_converter_wrote(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    try:
        llama_cpp.python()
        converter, packages = llama_cpp.converter()
    except Missing as missing:
        pytest.skip(f"no llama.cpp: {missing}")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.syspath_prepend(str(packages))
    (tmp_path / "scratch").mkdir()
    gguf_converter.check(converter, scratch=tmp_path / "scratch")

    result = exported(base_dir, adapter_dir, tmp_path, converter, in_child=True, quantization=quantization)

    assert "Its 93 tensors are the weights" in result["verification"]["explanation"]
    exported(base_dir, adapter_dir, work := tmp_path / "merged", None, format="merged", quantization=None)
    merged: Any = AutoModelForCausalLM.from_pretrained(work / "out", dtype=torch.float32).eval()
    ids = [2, *((index * 97) % gemma.VOCABULARY for index in range(40))]
    computed = llama_cpp.compute(tmp_path / "out" / "ft-x.gguf", work=tmp_path / "llama", ids=ids, texts=TEXTS)
    plain: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, before = (model(input_ids=torch.tensor([ids])).logits[0] for model in (merged, plain))
    difference, effect = (float((logits - expected).abs().max()) for logits in (torch.tensor(computed.logits), before))
    bound = {"f16": 0.02, "q8_0": 0.1}[quantization] * float(expected.abs().max())
    assert difference < bound < effect / 4, (difference, bound, effect)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    assert computed.tokens == [[2, *tokenizer(text)["input_ids"]] for text in TEXTS]

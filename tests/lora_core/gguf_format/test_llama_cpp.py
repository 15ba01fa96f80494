"""llama.cpp computes what PEFT computes with the adapter, from an exported model and from an exported LoRA file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer

from lora_core.base_model.model import load_base
from lora_core.gguf_format.tokenizer import BYTES, BYTES_OF_WORDS, DIGITS, SPLITS
from lora_core.gguf_format.write import write_gguf
from lora_core.model_files.export import export_model
from tests import tiny_base
from tests.lora_core.exports import trained
from tests.lora_core.gguf_format import families
from tests.services import llama_cpp
from tests.services.programs import Missing

IDS = [(index * 7919) % 49_152 for index in range(40)]
TEXTS = ("Hello world, it's 2024!\n\n  def f(x):\n\treturn x**2", "<|im_start|>user\nÄpfel 12345 日本語<|im_end|>\n")
BOUNDS = {"f16": 0.01, "q8_0": 0.1, "lora": 0.01}
"""Largest difference of the logits, as a part of the largest logit. llama.cpp rounds the inputs of its matmuls to f16,
and to q8_0 for such weights."""


SPLIT_TEXTS = (
    "It's the engine's 12345th run, IT'S 3.14!!\n\n\n  def f(x):\n\t\treturn x**2 / 10;//\n",
    "CamelCaseWords HTTPServer  two   spaces \r\n ends with spaces   ",
    "Äpfel über Straße, caf\u00e9 日本語 テスト12 한국어 привет مرحبا 👩‍🚀🚀 x\u00a0y … «z»",
)
"""In NFC, the form that llama.cpp expects."""
COMBINING_TEXT = "नमस्ते"
"""llama.cpp splits words of Tekken before combining marks, so this text is not for Tekken."""
IGNORE_MERGES = {"llama-bpe", "tekken"}
"""Tokenizers that take a word as one token if the vocabulary contains the word, whatever the merges are."""


@pytest.fixture(scope="module")
def needs_llama_cpp() -> None:
    try:
        llama_cpp.python()
    except Missing as missing:
        pytest.skip(f"no llama.cpp: {missing}")


@pytest.fixture(scope="module")
def adapter_dir(real_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real-adapter") / "adapter"
    trained(load_base(real_base_dir, dtype="bfloat16", device="cpu")).export("job", folder, base_name="smollm2")
    return folder


@pytest.fixture(scope="module")
def adapted(real_base_dir: Path, adapter_dir: Path) -> tuple[Tensor, float]:
    """PEFT's logits [T, V] in fp32, and the largest change by the adapter."""
    ids = torch.tensor([IDS])
    model = load_base(real_base_dir, dtype="float32", device="cpu").model
    with torch.no_grad():
        plain = model(input_ids=ids).logits[0]
        logits = PeftModel.from_pretrained(model, str(adapter_dir)).eval()(input_ids=ids).logits[0]
    return logits, float((logits - plain).abs().max())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("needs_llama_cpp")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["f16", "q8_0", "lora"])
def test_llama_cpp_computes_the_logits_of_the_adapted_model(real_base_dir, adapter_dir, adapted, tmp_path, kind):
    expected, effect = adapted
    if kind == "lora":
        export_model(
            adapter_dir,
            real_base_dir,
            tmp_path / "out",
            format="gguf-lora",
            quantization=None,
            name="ft:x",
            file_stem="x",
        )
        model, lora = tmp_path / "base.gguf", tmp_path / "out" / "x.gguf"
        write_gguf(real_base_dir, model, precision="f16", name="smollm2")
    else:
        export_model(
            adapter_dir, real_base_dir, tmp_path / "out", format="gguf", quantization=kind, name="ft:x", file_stem="x"
        )
        model, lora = tmp_path / "out" / "x.gguf", None

    computed = llama_cpp.compute(model, work=tmp_path / "work", ids=IDS, lora=lora, texts=TEXTS)

    difference = float((torch.tensor(computed.logits) - expected).abs().max())
    bound = BOUNDS[kind] * float(expected.abs().max())
    assert difference < bound < effect / 4, (difference, bound, effect)
    tokenizer = AutoTokenizer.from_pretrained(real_base_dir)
    assert computed.tokens == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("needs_llama_cpp")
@pytest.mark.parametrize(("steps", "name"), SPLITS.items(), ids=SPLITS.values())
def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, steps, name):
    folder = families.save("llama", tmp_path / "model", vocab_size=1024)
    texts = SPLIT_TEXTS if name == "tekken" else (*SPLIT_TEXTS, COMBINING_TEXT)
    _train_tokenizer_across_words(folder / "tokenizer.json", steps, texts)
    write_gguf(folder, tmp_path / "out.gguf", precision="f16", name="x")

    computed = llama_cpp.compute(tmp_path / "out.gguf", work=tmp_path / "work", ids=[1, 2], texts=texts)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert computed.tokens == [tokenizer(text)["input_ids"] for text in texts]


def _train_tokenizer_across_words(path: Path, steps: tuple[str, ...], texts: tuple[str, ...]) -> None:
    """Write a tokenizer with merges that cross words, so that each difference in splitting changes the tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=SPLITS[steps] in IGNORE_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=list(tiny_base.SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts] * 4, trainer)
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [_step(step) for step in steps]}
    content["normalizer"] = {"type": "NFC"} if SPLITS[steps] == "qwen2" else None
    path.write_text(json.dumps(content))


def _step(step: str) -> dict[str, Any]:
    """Return a step of SPLITS as tokenizer.json has it."""
    if step in (BYTES, BYTES_OF_WORDS):
        return {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": step == BYTES_OF_WORDS,
        }
    if step == DIGITS:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}

"""A model or adapter written as GGUF computes what its source computes, up to the rounding of the format."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from catalog.exports import formats
from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadAdapter, UnsupportedModel
from lora_core.gguf_format import tokenizer as tokenizer_module
from lora_core.gguf_format.architecture import ARCHITECTURES
from lora_core.gguf_format.modelfile import write_modelfile
from lora_core.gguf_format.tokenizer import QWEN_2
from lora_core.gguf_format.verify import verify_gguf, verify_gguf_lora
from lora_core.gguf_format.write import write_gguf
from lora_core.gguf_format.write_lora import write_gguf_lora
from lora_core.model_files.export import export_model
from lora_core.model_files.merge import merge_adapter
from tests.lora_core.gguf_format import families
from tests.lora_core.scenarios import Submission, admit, config, dataset

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
F32 = GGMLQuantizationType.F32
TEXTS = ("The lorry is red.", "What color\nis the  engine?", "<|im_start|>user\nÄ 12<|im_end|>")


def adapter_of(base_dir: Path, folder: Path, **lora: object) -> Path:
    """Train an adapter for a few steps and export it in PEFT's layout."""
    engine = Engine(load_base(base_dir, dtype="float32", device="cpu"), EngineConfig())
    settings = config(num_steps=6, learning_rate=2e-2)
    settings = replace(settings, lora=replace(settings.lora, **lora))  # pyright: ignore[reportArgumentType]
    admit(engine, "job", Submission(config=settings, train=dataset(1, [20, 33, 15])))
    while not engine.idle:
        engine.tick()
    engine.export("job", folder, base_name="tiny")
    return folder


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def llama_adapter(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return adapter_of(llama_dir, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.mark.parametrize("precision", ["f16", "q8_0"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_model_read_back_from_gguf_has_its_logits(tmp_path, family, precision):
    folder = families.save(family, tmp_path / "model")
    path = tmp_path / "out.gguf"

    write_gguf(folder, path, precision=precision, name="a model")

    report = verify_gguf(folder, path, precision=precision)
    assert 0 < report.max_abs_diff <= report.tolerance
    assert report.tolerance - report.max_abs_diff < 1e-3 * report.max_abs_logit
    kinds = {tensor.tensor_type for tensor in GGUFReader(path).tensors if len(tensor.shape) == 2}
    assert kinds == {GGMLQuantizationType[precision.upper()]}


def test_row_that_is_no_multiple_of_a_block_is_stored_in_f16(tmp_path):
    folder = families.save("llama", tmp_path / "model", intermediate_size=136)

    write_gguf(folder, tmp_path / "out.gguf", precision="q8_0", name="a model")

    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] is GGMLQuantizationType.F16
    assert kinds["blk.0.ffn_up.weight"] is GGMLQuantizationType.Q8_0
    assert verify_gguf(folder, tmp_path / "out.gguf", precision="q8_0").max_abs_diff > 0


@pytest.mark.parametrize("change", ["unpermuted", "scaled"])
def test_wrong_tensor_fails_the_verification(llama_dir, tmp_path, monkeypatch, change):
    wrong = {"unpermuted": lambda _self, _path, rows: rows, "scaled": lambda _self, _path, rows: 1.05 * rows}[change]
    monkeypatch.setattr("lora_core.gguf_format.architecture.Architecture.to_gguf", wrong)
    write_gguf(llama_dir, tmp_path / "out.gguf", precision="f16", name="a model")

    with pytest.raises(BadAdapter, match=r"its logits differ by .* explains only"):
        verify_gguf(llama_dir, tmp_path / "out.gguf", precision="f16")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["f16", "q8_0"])
@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1])
def test_file_with_a_wrong_update_fails_the_verification(
    llama_dir, llama_adapter, tmp_path, monkeypatch, precision, factor
):
    """The update is a hundredth of the trained one, so that quantization has a larger effect."""
    adapter, wrong = (
        small_copy(llama_adapter, tmp_path / "a", 0.01),
        small_copy(llama_adapter, tmp_path / "b", 0.01 * factor),
    )
    for folder in (adapter, wrong):
        merge_adapter(folder, llama_dir, folder / "merged", dtype="float32")

    write_gguf(wrong / "merged", tmp_path / "out.gguf", precision=precision, name="a model")

    with pytest.raises(BadAdapter, match="its logits differ"):
        verify_gguf(adapter / "merged", tmp_path / "out.gguf", precision=precision)


def small_copy(adapter: Path, folder: Path, factor: float) -> Path:
    """Copy an adapter with its updates multiplied by `factor`, without the evidence of training."""
    folder.mkdir()
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = {name: factor * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0])
def test_value_that_is_rounded_by_more_than_half_a_step_is_an_error(llama_dir, tmp_path, monkeypatch, kind):
    write_gguf(llama_dir, tmp_path / "out.gguf", precision="q8_0", name="a model")
    monkeypatch.setattr("lora_core.gguf_format.verify.kind_of", lambda shape, _: kind if len(shape) > 1 else F32)
    monkeypatch.setattr("lora_core.gguf_format.verify.quantize", lambda values, kind: quantize(1.02 * values, kind))

    with pytest.raises(BadAdapter, match="by more than half a step"):
        verify_gguf(llama_dir, tmp_path / "out.gguf", precision="q8_0")


def test_rotary_factors_of_the_file_are_verified(tmp_path, monkeypatch):
    folder = families.save("llama-3.1", tmp_path / "model")
    monkeypatch.setattr("lora_core.gguf_format.architecture.Architecture.rotary_factors", lambda _self: None)
    write_gguf(folder, tmp_path / "out.gguf", precision="f16", name="a model")

    with pytest.raises(BadAdapter, match="its logits differ"):
        verify_gguf(folder, tmp_path / "out.gguf", precision="f16")


def test_weight_beyond_the_range_of_f16_is_an_error(llama_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UnsupportedModel, match=r"output.weight contains values beyond the range of f16, 65,504"):
        write_gguf(folder, tmp_path / "out.gguf", precision="f16", name="a model")


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("gemma", {"head_dim": 16}, "this type can't be written"),
        ("llama", {"attention_bias": True}, "its linear layers have biases"),
        ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "it scales its rotary embeddings by 'yarn'",
        ),
    ],
)
def test_model_that_gguf_would_change_is_rejected(tmp_path, monkeypatch, model_type, options, reason):
    monkeypatch.setitem(families.FAMILIES, "other", (model_type, options))
    folder = families.save("other", tmp_path / "model")

    with pytest.raises(UnsupportedModel, match=reason) as caught:
        write_gguf(folder, tmp_path / "out.gguf", precision="f16", name="a model")

    assert "llama, mistral, qwen2, qwen3" in caught.value.remedy
    assert not (tmp_path / "out.gguf").exists()


def test_metadata_describes_the_tokenizer(llama_dir, tmp_path):
    write_gguf(llama_dir, tmp_path / "out.gguf", precision="f16", name="ft:tiny:docs")

    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "out.gguf").fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    assert fields["general.name"] == "ft:tiny:docs"
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        (
            [
                {"type": "Split", "pattern": {"Regex": QWEN_2}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
            "qwen2",
        ),
        ([{"type": "ByteLevel", "add_prefix_space": True}], None),
        ([{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_rule_that_splits_text_is_named_or_rejected(steps, name):
    content = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    if name is not None:
        assert tokenizer_module._split_name(content) == name
        return
    with pytest.raises(UnsupportedModel, match="splits text into words has no name"):
        tokenizer_module._split_name(content)


PREPEND = {"type": "Prepend", "prepend": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


@pytest.mark.parametrize(
    ("normalizer", "byte_fallback", "reason"),
    [
        (None, False, None),
        ({"type": "NFC"}, False, None),
        ({"type": "Sequence", "normalizers": []}, False, None),
        ({"type": "Lowercase"}, False, "normalizer 'Lowercase'"),
        ({"type": "NFKC"}, False, "normalizer 'NFKC'"),
        (PREPEND, False, "normalizer 'Prepend'"),
        (
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Sequence", "normalizers": [REPLACE]}]},
            False,
            "normalizer 'Replace'",
        ),
        ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, True, None),
        (REPLACE, True, None),
        (REPLACE | {"pattern": {"String": "\n"}}, True, "normalizer 'Replace'"),
        (PREPEND | {"prepend": "x"}, True, "normalizer 'Prepend'"),
        (PREPEND, True, "does not replace spaces"),
    ],
)
def test_normalizer_that_llama_cpp_lacks_is_rejected(llama_dir, tmp_path, normalizer, byte_fallback, reason):
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = byte_fallback
    content["normalizer"] = normalizer
    if byte_fallback:
        content["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))

    if reason is None:
        write_gguf(folder, tmp_path / "out.gguf", precision="f16", name="a model")
        return
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        write_gguf(folder, tmp_path / "out.gguf", precision="f16", name="a model")
    assert "Use the format 'merged'" in caught.value.remedy


def test_scores_of_a_sentencepiece_tokenizer_follow_its_merges(tmp_path):
    folder = families.save("llama", tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    content["model"] = {
        "type": "BPE",
        "unk_token": "<unk>",
        "byte_fallback": True,
        "vocab": {text: index for index, text in enumerate(texts)},
        "merges": [["a", "b"], ["\u2581", "ab"]],
    }
    content["added_tokens"] = [
        {"id": index, "content": texts[index], "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for index in range(3)
    ]
    content["normalizer"] = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
    content["pre_tokenizer"], content["decoder"] = None, None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )

    write_gguf(folder, tmp_path / "out.gguf", precision="f16", name="a model")

    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    kinds, scores = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.scores"]
    assert [kinds[index] for index in (0, 1, 3, 260, 300)] == [2, 3, 6, 1, 5]
    assert scores[texts.index("ab")] > scores[texts.index("\u2581ab")] > scores[texts.index("a")]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_lora_file_changes_the_base_model_as_the_adapter_does(tmp_path, family):
    folder = families.save(family, tmp_path / "model")
    adapter = adapter_of(folder, tmp_path / "adapter", rank_pattern=(("q_proj", 3),), alpha_pattern=(("k_proj", 5),))

    write_gguf_lora(adapter, folder, tmp_path / "lora.gguf", name="an adapter")

    report = verify_gguf_lora(adapter, folder, tmp_path / "lora.gguf")
    assert report.max_abs_diff <= report.tolerance < 1e-3
    reader = GGUFReader(tmp_path / "lora.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 8
    shapes = {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in reader.tensors}
    assert shapes["blk.0.attn_q.weight.lora_a"] == [3, 64]
    assert shapes["blk.0.attn_q.weight.lora_b"] == [64, 3]
    assert len(shapes) == 2 * 14


@pytest.mark.parametrize("change", ["unpermuted", "unscaled"])
def test_wrong_lora_file_fails_the_verification(llama_dir, llama_adapter, tmp_path, monkeypatch, change):
    if change == "unpermuted":
        monkeypatch.setattr("lora_core.gguf_format.architecture.Architecture.to_gguf", lambda _self, _path, rows: rows)
    else:
        monkeypatch.setattr("lora_core.gguf_format.write_lora._scale", lambda *_arguments: 0.5)
    write_gguf_lora(llama_adapter, llama_dir, tmp_path / "lora.gguf", name="an adapter")

    with pytest.raises(BadAdapter, match="its logits differ"):
        verify_gguf_lora(llama_adapter, llama_dir, tmp_path / "lora.gguf")


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "it uses DoRA"),
        ({"modules_to_save": ("lm_head",)}, "modules_to_save"),
        ({"trainable_token_indices": (1, 2)}, "trainable_token_indices"),
    ],
)
def test_adapter_with_other_parts_is_no_lora_file(llama_dir, tmp_path, lora, reason):
    adapter = adapter_of(llama_dir, tmp_path / "adapter", **lora)

    with pytest.raises(UnsupportedModel, match=reason) as caught:
        write_gguf_lora(adapter, llama_dir, tmp_path / "lora.gguf", name="an adapter")

    assert "'gguf' or 'merged'" in caught.value.remedy


def test_modelfile_has_the_template_and_the_stop_tokens(llama_dir, tmp_path):
    write_modelfile(llama_dir, tmp_path / "Modelfile", gguf_name="x.gguf")

    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith("FROM ./x.gguf\nTEMPLATE ")
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if' in text
    assert text.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'].upper() }}{% endfor %}",
        "{{ messages[0]['content'] }}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] }}{% endfor %}",
        "{{ tools if tools else '' }}{% for m in messages %}{{ '<' ~ m['role'] ~ '>' ~ m['content'] }}{% endfor %}",
    ],
)
def test_template_that_does_more_than_surround_messages_is_left_to_ollama(llama_dir, tmp_path, template):
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    (folder / "chat_template.jinja").write_text(template)

    write_modelfile(folder, tmp_path / "Modelfile", gguf_name="x.gguf")

    assert (tmp_path / "Modelfile").read_text() == 'FROM ./x.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_default_template_counts_if_there_is_one_for_tools(llama_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")

    write_modelfile(folder, tmp_path / "Modelfile", gguf_name="x.gguf")
    write_modelfile(llama_dir, tmp_path / "Reference", gguf_name="x.gguf")

    assert (tmp_path / "Modelfile").read_text() == (tmp_path / "Reference").read_text()


def test_default_system_message_of_a_template_is_kept(llama_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llama_dir, folder)
    rest = (folder / "chat_template.jinja").read_text()
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    (folder / "chat_template.jinja").write_text(default + rest)

    write_modelfile(folder, tmp_path / "Modelfile", gguf_name="x.gguf")

    text = (tmp_path / "Modelfile").read_text()
    assert 'TEMPLATE """{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range' in text


@pytest.mark.parametrize(("format", "quantization"), [("merged", None), ("gguf", "q8_0"), ("gguf-lora", None)])
def test_export_creates_the_folder_with_what_was_measured(llama_dir, llama_adapter, tmp_path, format, quantization):  # noqa: A002
    out = tmp_path / "out"

    result = export_model(
        llama_adapter, llama_dir, out, format=format, quantization=quantization, name="ft:x", file_stem="ft-x"
    )

    verification, cost = result["verification"], result["cost"]
    assert verification["max_abs_diff"] <= verification["tolerance"]
    if format == "gguf-lora":
        assert cost is None
    else:
        assert cost["same_operations"]
        assert cost["base_seconds"] > 0
        assert cost["merged_seconds"] > 0
    expected = {
        "merged": {
            "config.json",
            "model.safetensors",
            "merge.json",
            *families.TOKENIZER_FILES,
            "generation_config.json",
        },
        "gguf": {"ft-x.gguf", "Modelfile", "export.json"},
        "gguf-lora": {"ft-x.gguf", "export.json"},
    }
    assert {path.name for path in out.iterdir()} == expected[format]
    assert [path for path in tmp_path.iterdir() if path != out] == []


def test_failed_verification_leaves_no_folder(llama_dir, llama_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_core.gguf_format.architecture.Architecture.to_gguf", lambda _self, _path, rows: rows)

    with pytest.raises(BadAdapter, match="its logits differ"):
        export_model(
            llama_adapter, llama_dir, tmp_path / "out", format="gguf", quantization="f16", name="x", file_stem="x"
        )

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "quantization"), [("merged", "f16"), ("gguf", None)])
def test_quantization_belongs_to_gguf(llama_dir, llama_adapter, tmp_path, format, quantization):  # noqa: A002
    with pytest.raises(UnsupportedModel, match="quantization"):
        export_model(
            llama_adapter,
            llama_dir,
            tmp_path / "out",
            format=format,
            quantization=quantization,
            name="x",
            file_stem="x",
        )


def test_stored_q8_0_error_stays_below_the_bound_of_the_tolerance():
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    from lora_core.gguf_format.verify import largest_error

    stored = gguf.quants.dequantize(
        gguf.quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
    )

    assert (np.abs(stored - weight.numpy()) <= largest_error(weight, GGMLQuantizationType.Q8_0).numpy()).all()


def test_service_accepts_the_architectures_that_can_be_written():
    mapping: Any = AutoModelForCausalLM._model_mapping
    classes = {mapping[type(AutoConfig.for_model(kind))].__name__ for kind in ARCHITECTURES}

    assert classes == formats.GGUF_ARCHITECTURES

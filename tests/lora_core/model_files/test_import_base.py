"""Base models are imported only from safetensors or GGUF, and unsupported models are rejected by name."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, MiniCPM3Config, PreTrainedTokenizerFast

from lora_core.base_model.loading import load_with_transformers, read_config, refuse_code
from lora_core.base_model.model import describe_base, load_base
from lora_core.errors import UnreachableSource, UnsafeFile, UnsupportedModel
from lora_core.model_files import import_base as model_file_import_base
from lora_core.model_files.import_base import import_base
from lora_core.model_files.license import license_of_folder
from tests.lora_core.layers.test_longrope import longrope
from tests.lora_core.loopback_hub import Importer, hub_that_refuses, hub_that_serves, importer

ROOT = Path(__file__).parents[3]
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def copy_source(base_dir: Path, folder: Path) -> Path:
    """Make a folder as a user might provide it: the tiny Llama with a tokenizer and a chat template."""
    folder.mkdir()
    for path in base_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    give_tokenizer(folder)
    return folder


def give_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)


@pytest.fixture
def source(base_dirs, tmp_path) -> Path:
    return copy_source(base_dirs["llama"], tmp_path / "source")


def import_folder(source: Path, target: Path) -> Path:
    import_base(source=str(source), kind="folder", revision=None, target_dir=target)
    return target


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_folder_is_imported_with_the_same_bytes_each_time(source, tmp_path):
    first, second = (import_folder(source, tmp_path / name) for name in ("first", "second"))
    assert digests(first) == digests(second)
    assert {"config.json", "generation_config.json", "model.safetensors"} <= digests(first).keys()
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= digests(first).keys()


@pytest.mark.parametrize(("given", "stored"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "BF16")])
def test_fp32_stays_fp32_and_other_dtypes_become_bf16(source, tmp_path, given, stored):
    weights = load_file(source / "model.safetensors")
    weights = {name: weight.to(getattr(torch, given)) for name, weight in weights.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    base_dir = import_folder(source, tmp_path / "base")

    imported = load_file(base_dir / "model.safetensors")
    expected = torch.float32 if stored == "F32" else torch.bfloat16
    assert {weight.dtype for weight in imported.values()} == {expected}
    assert all(torch.equal(weight, weights[name].to(expected)) for name, weight in imported.items())
    assert describe_base(base_dir)["dtype"] == str(expected).removeprefix("torch.")


def test_pickles_are_rejected(source, tmp_path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pickle files \(pytorch_model.bin\)"):
        import_folder(source, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_label_that_looks_like_a_repository_is_not_a_reference(source):
    edit_json(source / "config.json", id2label={"0": "N/A", "1": "yes/no"}, label2id={"N/A": 0, "yes/no": 1})

    refuse_code(source)

    edit_json(source / "config.json", id2label={"0": "N/A", "use_kernels": "yes"})
    with pytest.raises(UnsupportedModel, match="use_kernels"):
        refuse_code(source)
    edit_json(source / "config.json", id2label={"0": {"weights": "owner/name"}})
    with pytest.raises(UnsupportedModel, match="refers to a repository"):
        refuse_code(source)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_code_in_the_repository_is_rejected(source, tmp_path, name):
    edit_json(source / name, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UnsupportedModel, match="auto_map"):
        import_folder(source, tmp_path / "base")


FAKE_KERNELS = """
import sys
def get_kernel(*names, **options):
    sys.stdout.write(f"LOADED {names[0]}")
    raise ImportError("no kernel")
class Anything:
    def __init__(self, *_, **__): pass
    def __getattr__(self, name): return Anything()
    def __call__(self, *_, **__): return Anything()
def __getattr__(name): return Anything
"""
REFUSE_BY_CONFIG = """
import sys
from pathlib import Path
from lora_core.model_files.import_base import _refuse_by_config
from lora_core.errors import UnsupportedModel
for folder in sys.argv[1:]:
    try:
        _refuse_by_config(Path(folder))
    except UnsupportedModel as error:
        print("REFUSED", error)
    else:
        print("TAKEN", folder)
"""


def test_kernel_named_by_a_config_is_not_loaded(source, tmp_path):
    """Kernels are native code from the hub. A package that is common on machines with GPUs fetches them."""
    entries = [
        {"_attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": "someone/evil-kernel@main:attend"},
        {"attn_implementation": "flash_attention_2"},
        {"text_config": {"_attn_implementation": "someone/evil-kernel"}},
    ]
    package = tmp_path / "path" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_KERNELS)
    metadata = package.with_name("kernels-0.18.2.dist-info")
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    for number, entry in enumerate(entries):
        shutil.copytree(source, tmp_path / str(number))
        edit_json(tmp_path / str(number) / "config.json", **entry)

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}
    argv = [sys.executable, "-c", REFUSE_BY_CONFIG, *(str(tmp_path / str(number)) for number in range(len(entries)))]
    ended = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)

    results = ended.stdout.splitlines()
    assert "LOADED" not in ended.stdout
    assert [line.split()[0] for line in results] == ["REFUSED"] * len(entries), ended.stderr
    assert all("attn_implementation" in line for line in results)


@pytest.mark.parametrize(
    ("entry", "file"),
    [
        ({"experts_implementation": "someone/experts"}, "config.json"),
        ({"layers": [{"_experts_implementation_internal": {"": "grouped"}}]}, "config.json"),
        ({"use_kernels": True}, "config.json"),
        ({"use_kernels": True}, "generation_config.json"),
        ({"loads_from": "someone/weights"}, "config.json"),
        ({"of": {"loads_from": "someone/weights@main:part"}}, "config.json"),
        ({"of": [{"auto_map": {"AutoConfig": "evil.Config"}}]}, "tokenizer_config.json"),
    ],
)
def test_entries_that_may_load_code_are_rejected_by_name_at_any_depth(source, tmp_path, entry, file):
    edit_json(source / file, **entry)

    with pytest.raises(UnsupportedModel, match=f"{file} has '(_?experts_|use_kernels|loads_from|auto_map)"):
        import_folder(source, tmp_path / "base")


def test_entries_that_name_the_origin_or_load_nothing_are_accepted(source, tmp_path):
    origin = {"_name_or_path": "someone/model", "model_name": "someone/model", "base_model_name_or_path": "a/b"}
    loads_nothing = {"_attn_implementation": "sdpa", "_attn_implementation_autoset": True, "use_kernels": False}
    edit_json(source / "config.json", **origin, **loads_nothing)

    import_folder(source, tmp_path / "base")

    assert read_config(tmp_path / "base")._attn_implementation in (None, "sdpa", "eager")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized"),
        ({"model_type": "never_heard_of"}, "can't be read"),
        ({"model_type": "t5"}, "no causal language model"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"hidden_size": "wide"}, "can't be read.*'hidden_size'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "can't be read.*'long_factor'"),
        ({"rope_parameters": longrope(7)}, "no model can be built.*RuntimeError"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "no model can be built.*'nonsense'"),
    ],
)
def test_models_that_cannot_be_trained_are_rejected(source, tmp_path, changes, reason):
    edit_json(source / "config.json", **changes)
    with pytest.raises(UnsupportedModel, match=f"(?s){reason}"):
        import_folder(source, tmp_path / "base")


@pytest.mark.parametrize(
    ("family", "num_layers", "name"),
    [
        ("bert", 2, "BertLMHeadModel"),  # bidirectional
        ("electra", 2, "ElectraForCausalLM"),  # has layers between the last hidden states and the head
        ("bloom", 2, "bloom"),  # has a custom attention
        ("llama", 0, "llama"),  # has nothing to adapt
    ],
)
def test_architecture_that_cannot_be_trained_is_rejected_by_name(tmp_path, family, num_layers, name):
    config = AutoConfig.for_model(family, num_hidden_layers=num_layers, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    give_tokenizer(tmp_path / "source")

    with pytest.raises(UnsupportedModel, match=name) as caught:
        import_folder(tmp_path / "source", tmp_path / "base")

    assert "Choose a d" in caught.value.remedy
    assert not (tmp_path / "base").exists()


def test_weights_without_finite_logits_are_rejected(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM can't be packed: its logits are not finite"):
        import_folder(source, tmp_path / "base")


def test_folder_without_config_or_weights_is_rejected(source, tmp_path):
    (source / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="no safetensors"):
        import_folder(source, tmp_path / "base")
    (source / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"does not contain config\.json"):
        import_folder(source, tmp_path / "base")


def test_folder_without_a_tokenizer_is_rejected(source, tmp_path):
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UnsupportedModel, match="tokenizer"):
        import_folder(source, tmp_path / "base")


def test_safetensors_bomb_is_rejected_on_import_and_on_load(source, base_dirs, tmp_path):
    (source / "model.safetensors").write_bytes((2**30).to_bytes(8, "little") + b"{")
    with pytest.raises(UnsafeFile, match="header of 1,073,741,824 bytes"):
        import_folder(source, tmp_path / "base")
    with pytest.raises(UnsafeFile):
        load_base(source, dtype="float32", device="cpu")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_match_the_config_are_rejected(source, tmp_path, change):
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unknown":
        weights["model.layers.9.mlp.up_proj.weight"] = weights[name].clone()
    else:
        weights[name] = weights[name][:3].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match="don't match"):
        load_base(source, dtype="float32", device="cpu")
    with pytest.raises(UnsupportedModel, match="don't match"):
        import_folder(source, tmp_path / "base")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\ntags:\n- a\n---\nlicense: mit\n", "apache-2.0"),
        ("---\nlicense: 'other'  # see below\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ('---\nlicense: "mit"\r\n---\n', "mit"),
        ("---\nbase_model: a/b\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense:\n- mit\nlanguage: en\n---\n", "mit"),
        ("---\nlicense:  # both\n  - mit\n  - 'apache-2.0'\ntags:\n- a\n---\n", "mit, apache-2.0"),
        ('---\nlicense: [mit, "apache-2.0"]\n---\n', "mit, apache-2.0"),
        ("---\nlicense:\n- other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ("---\nlicense:\ntags:\n- mit\n---\n", None),
        ("---\nlicense: []\n---\n", None),
        ("---\nlicense: other\n---\n", "other"),
        (None, None),
    ],
)
def test_license_is_read_from_the_model_card(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of_folder(tmp_path) == expected


def test_model_read_from_gguf_is_released_before_the_result_is_tested(source, tmp_path, monkeypatch):
    held = []

    def load(folder, *, dtype, gguf_file):
        model = load_with_transformers(source, dtype=dtype)
        held.append(weakref.ref(model))
        return model

    def try_out(directory, dtype):
        held.append(held[0]())

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(model_file_import_base, "load_with_transformers", load)
    tokenizer = SimpleNamespace(chat_template=None, save_pretrained=lambda _: None)
    monkeypatch.setattr(model_file_import_base, "_tokenizer", lambda *_, **__: tokenizer)
    monkeypatch.setattr(model_file_import_base, "_refuse_untrainable", try_out)
    monkeypatch.setattr(model_file_import_base, "license_of_gguf", lambda _: None)
    monkeypatch.setattr(model_file_import_base, "refuse_scaled_rotation", lambda _: None)

    import_base(source=str(tmp_path / "model.gguf"), kind="gguf", revision=None, target_dir=tmp_path / "base")

    assert held[1:] == [None]


@pytest.fixture(scope="module")
def child(tmp_path_factory) -> Iterator[Importer]:
    with importer(tmp_path_factory.mktemp("importer")) as opened:
        yield opened


@pytest.mark.parametrize("num_shards", [1, 3])
def test_only_needed_files_of_one_commit_are_downloaded(source, tmp_path, child, num_shards):
    commit, expected = f"{num_shards}" * 40, import_folder(source, tmp_path / "expected")
    if num_shards > 1:
        split_weights(source, num_shards)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    needed = {path.name for path in source.iterdir()}
    (source / "original").mkdir()
    others = (
        "consolidated.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
        "modeling.py",
        "other.json",
    )
    for name in others:
        (source / name).write_bytes(b"something else")
    requested: list[str] = []

    results = child.import_from(hub_that_serves(source, commit, requested), tmp_path, "model")

    assert results == [f"{commit} apache-2.0"], child.output()
    assert {name for name in requested if name in {*needed, *others}} == needed
    assert digests(tmp_path / "base") == digests(expected)


def test_chat_template_for_tools_is_imported_too(source, tmp_path, child):
    name = "additional_chat_templates/tool_use.jinja"
    (source / name).parent.mkdir()
    (source / name).write_text("{{ tools | tojson }}")

    imported = import_folder(source, tmp_path / "from folder")
    results = child.import_from(hub_that_serves(source, "c" * 40, []), tmp_path, "model")

    assert results == [f"{'c' * 40} None"], child.output()
    for folder in (imported, tmp_path / "base"):
        assert (folder / name).read_text() == "{{ tools | tojson }}"
        assert (folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_sentencepiece_model_is_kept_for_converters(source, tmp_path):
    (source / "tokenizer.model").write_bytes(b"pieces")

    imported = import_folder(source, tmp_path / "base")

    assert (imported / "tokenizer.model").read_bytes() == b"pieces"


def test_no_weights_are_downloaded_if_the_config_is_rejected(source, tmp_path, child):
    edit_json(source / "config.json", vision_config={"hidden_size": 64})
    requested: list[str] = []

    (results,) = child.import_from(hub_that_serves(source, "a" * 40, requested), tmp_path, "model")

    assert "also reads images (vision_config)" in results, child.output()
    assert "config.json" in requested
    assert not [name for name in requested if name.endswith(".safetensors")]


def split_weights(folder: Path, num_shards: int) -> None:
    """Split the weights like the repository of a large model, into shards and an index of tensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(weights.items())[shard::num_shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("named", ["../elsewhere.safetensors", "original/model.safetensors", "pytorch_model.bin"])
def test_index_that_names_other_files_is_rejected(source, tmp_path, named):
    split_weights(source, 2)
    edit_json(source / "model.safetensors.index.json", weight_map={"lm_head.weight": named})
    with pytest.raises(UnsupportedModel, match="index"):
        import_folder(source, tmp_path / "base")


def test_other_files_do_not_affect_the_dtype_of_the_weights(source, tmp_path):
    expected = import_folder(source, tmp_path / "expected")
    weights = load_file(source / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, source / "consolidated.safetensors")
    assert digests(import_folder(source, tmp_path / "base")) == digests(expected)


def test_branch_is_resolved_to_a_commit_and_an_unreachable_hub_is_reported(source, tmp_path, monkeypatch):
    requested = []
    commit = SimpleNamespace(sha="b" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, revision: requested.append(revision) or commit)

    def snapshot_download(_, *, revision, **__):
        requested.append(revision)
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UnreachableSource, match="'org/model' at main can't be downloaded: the worker can't"):
        import_base(source="org/model", kind="hub", revision="main", target_dir=tmp_path / "base")
    assert requested == ["main", "b" * 40]


def test_reason_of_a_failed_hub_request_is_reported(tmp_path, child):
    cases = {
        "closed": (403, "GatedRepo", "gated"),
        "absent": (404, "RepoNotFound", "does not exist or is private"),
        "other": (404, "RevisionNotFound", "the revision does not exist"),
        "down": (503, None, "can't reach the Hub"),
    }

    hub = hub_that_refuses({name: case[:2] for name, case in cases.items()})
    results = child.import_from(hub, tmp_path, *cases)

    found = [reason in line for (*_, reason), line in zip(cases.values(), results, strict=True)]
    assert found == [True] * 4, (results, child.output())
    assert not (tmp_path / "base").exists()


def test_model_whose_forward_pass_fails_is_rejected_by_name(tmp_path):
    """MiniCPM3 expands its keys twice if heads share them."""
    config = MiniCPM3Config.from_dict(
        {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2, "max_position_embeddings": 64}
    )
    folder = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    give_tokenizer(folder)

    with pytest.raises(UnsupportedModel, match="can't be packed: the forward pass of transformers fails"):
        import_base(source=str(folder), kind="folder", revision=None, target_dir=tmp_path / "base")

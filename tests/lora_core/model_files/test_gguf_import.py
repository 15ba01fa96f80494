"""A GGUF file as a base model: its metadata, and rejection of files whose import would lose information."""

import json
import re

import numpy as np
import pytest
from gguf import GGUFWriter

from lora_core.errors import UnreachableSource, UnsupportedModel
from lora_core.model_files import gguf
from lora_core.model_files.gguf import refuse_scaled_rotation, template_beside
from lora_core.model_files.import_base import import_base
from lora_core.model_files.license import license_of_gguf


def test_license_of_a_gguf_file_is_read_from_its_metadata(tmp_path):
    for name, expected in {"with": "apache-2.0", "without": None}.items():
        writer = GGUFWriter(tmp_path / name, "llama")
        if expected is not None:
            writer.add_license(expected)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert license_of_gguf(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (None, UnreachableSource, "does not exist"),
        (b"\x80\x04 pickle", UnsupportedModel, "not a GGUF"),
        (b"GGUF" + bytes(3), UnsupportedModel, "can't be read"),
    ],
)
def test_missing_or_damaged_gguf_file_is_rejected(tmp_path, content, error, reason):
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)

    with pytest.raises(error, match=reason):
        import_base(source=str(tmp_path / "model.gguf"), kind="gguf", revision=None, target_dir=tmp_path / "base")


@pytest.mark.parametrize(
    ("tensor", "metadata", "entry"),
    [
        ("rope_freqs.weight", {}, "rope_freqs.weight"),
        ("rope_factors_long.weight", {}, "rope_factors_long.weight"),
        (None, {"scaling.type": "yarn"}, "llama.rope.scaling.type = yarn"),
        (None, {"scaling.type": "linear", "scaling.factor": 4.0}, "llama.rope.scaling.factor = 4.0"),
        (None, {"scaling.factor": 4.0}, "llama.rope.scaling.factor = 4.0"),
        (None, {"scale_linear": 4.0}, "llama.rope.scale_linear = 4.0"),
        (None, {"scaling.type": "linear", "scaling.factor": 1.0}, None),
        (None, {"scaling.type": "none", "scaling.factor": 4.0}, None),
        (None, {}, None),
    ],
)
def test_gguf_file_with_scaled_rotation_is_rejected_by_its_entry(tmp_path, tensor, metadata, entry):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor(tensor or "blk.0.attn_q.weight", np.ones(8, np.float32))
    for name, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(f"llama.rope.{name}", value)
        else:
            writer.add_float32(f"llama.rope.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    if entry is None:
        refuse_scaled_rotation(tmp_path / "model.gguf")
        return
    with pytest.raises(UnsupportedModel, match=re.escape(entry)):
        import_base(source=str(tmp_path / "model.gguf"), kind="gguf", revision=None, target_dir=tmp_path / "base")
    assert not (tmp_path / "base").exists()


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, None),
        (b'{"chat_template": "C"}', "C"),
        (json.dumps({"chat_template": NAMED}).encode(), "D"),
        (b'{"bos_token": "<s>"}', None),
        (b"[]", None),
        (b"{", None),
        (b'{"chat_template": "\xff"}', None),
        (b'{"chat_template": [{"name": ["default"]}]}', None),
        (b'{"chat_template": "C"}'.ljust(101), None),
    ],
)
def test_chat_template_of_the_tokenizer_configuration_next_to_a_gguf_file_is_used(
    tmp_path, monkeypatch, content, expected
):
    monkeypatch.setattr(gguf, "MAX_BYTES", 100)
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(content)

    assert template_beside(tmp_path / "model.gguf") == expected

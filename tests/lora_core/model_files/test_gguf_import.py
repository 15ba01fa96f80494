"""A GGUF file as a base: what is told of it, and what would be lost in reading it is refused before it is read."""

import re

import numpy as np
import pytest
from gguf import GGUFWriter

from lora_core.errors import UnreachableSource, UnsupportedModel
from lora_core.model_files.gguf import refuse_scaled_rotation
from lora_core.model_files.import_base import import_base
from lora_core.model_files.license import license_of_gguf


def test_the_license_of_a_gguf_file_is_in_its_metadata(tmp_path):
    for name, expected in {"with": "apache-2.0", "without": None}.items():
        writer = GGUFWriter(tmp_path / name, "llama")
        if expected is not None:
            writer.add_license(expected)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert license_of_gguf(tmp_path / name) == expected


def test_a_gguf_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UnreachableSource, match="There is no file"):
        import_base(source=str(tmp_path / "model.gguf"), kind="gguf", revision=None, target_dir=tmp_path / "base")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"\x80\x04 pickle")
    with pytest.raises(UnsupportedModel, match="not a GGUF"):
        import_base(source=str(tmp_path / "model.gguf"), kind="gguf", revision=None, target_dir=tmp_path / "base")


def test_a_gguf_file_that_is_cut_off_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(UnsupportedModel, match="can't be read"):
        import_base(source=str(tmp_path / "model.gguf"), kind="gguf", revision=None, target_dir=tmp_path / "base")


@pytest.mark.parametrize(
    ("tensor", "told", "said"),
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
def test_a_gguf_file_whose_rotation_is_scaled_is_refused_by_what_would_be_lost(tmp_path, tensor, told, said):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor(tensor or "blk.0.attn_q.weight", np.ones(8, np.float32))
    for name, value in told.items():
        if isinstance(value, str):
            writer.add_string(f"llama.rope.{name}", value)
        else:
            writer.add_float32(f"llama.rope.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    if said is None:
        refuse_scaled_rotation(tmp_path / "model.gguf")
        return
    with pytest.raises(UnsupportedModel, match=re.escape(said)):
        import_base(source=str(tmp_path / "model.gguf"), kind="gguf", revision=None, target_dir=tmp_path / "base")
    assert not (tmp_path / "base").exists()

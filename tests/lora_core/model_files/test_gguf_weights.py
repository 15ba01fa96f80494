"""A GGUF file with weights: a tiny Llama is written as llama.cpp writes it, imported, trained and served.

Slow tests use a real model of 135M parameters (tests/lora_core/base_model/test_model.py).
"""

import json
import re
from copy import deepcopy
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.events import Event, JobStepped
from lora_core.model_files.import_base import import_base
from lora_core.peft_format.verify import verify_export
from tests.lora_core.scenarios import VOCAB, Submission, admit, config, dataset

NUM_HEADS, NUM_KV_HEADS = 4, 2
ROPE_THETA, RMS_EPS = 50_000.0, 1e-3  # both differ from the defaults of transformers
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
KINDS = {"F16": GGMLQuantizationType.F16, "Q8_0": GGMLQuantizationType.Q8_0}


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_KV_HEADS,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            rms_norm_eps=RMS_EPS,
            initializer_range=0.1,
            tie_word_embeddings=False,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # otherwise all are 1 and can't be distinguished
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_file_becomes_a_base_with_its_weights_that_trains_and_serves(original, tmp_path, kind):
    write_llama(tmp_path / "model.gguf", original, KINDS[kind])

    import_base(source=str(tmp_path / "model.gguf"), kind="gguf", revision=None, target_dir=tmp_path / "base")

    base = load_base(tmp_path / "base", dtype="bfloat16", device="cpu")
    imported, written = base.model.state_dict(), original.state_dict()
    assert imported.keys() == written.keys()
    for name, weight in written.items():
        assert torch.equal(imported[name], stored(weight, KINDS[kind]).bfloat16()), name
        assert ((imported[name].float() - weight).abs() <= largest_error(weight)).all(), name
    assert_computes_as(original, tmp_path / "base")

    engine = Engine(base, EngineConfig())
    admit(engine, "job", Submission(config=config(num_steps=2), train=dataset(1, [20, 33])))
    events: list[Event] = []
    while not engine.idle:
        events += engine.tick()
    assert [event.step for event in events if isinstance(event, JobStepped)] == [1, 2]
    engine.export("job", tmp_path / "adapter", base_name="tiny")
    verdict = verify_export(base, tmp_path / "adapter")
    assert verdict.passed
    assert verdict.max_abs_effect > verdict.tolerance

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer("the hero")["input_ids"] == [256, TOKENS.index("Ġ"), 257, TOKENS.index("r"), TOKENS.index("o")]


@pytest.mark.parametrize("is_given", [False, True], ids=["next to the file", "given"])
def test_chat_template_becomes_that_of_the_base(original, tmp_path, is_given):
    template = "{{ messages[0]['content'] }}!"
    write_llama(tmp_path / "model.gguf", original, GGMLQuantizationType.F16)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "?" if is_given else template}))

    import_base(
        source=str(tmp_path / "model.gguf"),
        kind="gguf",
        revision=None,
        chat_template=template if is_given else None,
        target_dir=tmp_path / "base",
    )

    assert (tmp_path / "base" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}!"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "the hero"}], tokenize=False)
    assert shown == "the hero!"


def stored(weight: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Return the weight as the file stores it, in fp32."""
    kind = GGMLQuantizationType.F32 if weight.ndim == 1 else kind
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))


def largest_error(weight: Tensor) -> Tensor:
    """Return the maximum error of Q8_0 and bf16. F16 has a smaller error.

    Q8_0: half a step of a block. The step is the largest of 32 values divided by 127, stored as F16. bf16: half a unit
    in the last place.
    """
    blocks = weight.view(-1, 32)
    steps = (blocks.abs().amax(dim=1, keepdim=True) / 127).expand_as(blocks).reshape(weight.shape)
    return steps / 2 * (1 + 2**-8) + weight.abs() * (2**-11 + 2**-8)


def assert_computes_as(original: LlamaForCausalLM, folder: Path) -> None:
    """Check that the same weights give the same logits, so heads, rotation and norm epsilon are those of the file."""
    model = load_base(folder, dtype="float32", device="cpu").model
    reference = deepcopy(original)
    reference.load_state_dict(model.state_dict())
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)


TOKENS = [*sorted(ByteLevel.alphabet()), "the", "he", "th", "<|endoftext|>"]
MERGES = ["t h", "th e", "h e"]


def write_llama(path: Path, model: LlamaForCausalLM, kind: GGMLQuantizationType) -> None:
    """Write matrices as `kind`, norms as F32, and a byte-level BPE with a few merges."""
    settings = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_dimension_count(settings.hidden_size // NUM_HEADS)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    writer.add_vocab_size(VOCAB)
    tokens = TOKENS + [f"<|unused_{number}|>" for number in range(VOCAB - len(TOKENS))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1 if number < 259 else 3 for number in range(VOCAB)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(259)
    for name, weight in model.state_dict().items():
        numbers = permuted(name, weight).numpy()  # permutes full rows, so that the stored values of a row don't change
        as_kind = GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(numbers, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.(.*)\.weight", name)
    if layer is not None:
        return f"blk.{layer[1]}.{NAMES[layer[2]]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def permuted(name: str, weight: Tensor) -> Tensor:
    """Permute rows for llama.cpp, which rotates neighboring pairs of a head's rows. transformers rotates its halves."""
    num_heads = {"q_proj": NUM_HEADS, "k_proj": NUM_KV_HEADS}.get(name.split(".")[-2])
    if num_heads is None:
        return weight
    halves = weight.view(num_heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()

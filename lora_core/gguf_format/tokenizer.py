# pyright: basic
"""Writes a tokenizer as GGUF metadata: tokens, types, merges or scores, the rule that splits text, special tokens, and
the chat template."""

import json
from pathlib import Path
from typing import Any, Literal

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from lora_core.errors import UnsupportedModel

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = "bytes"
BYTES_OF_WORDS = "bytes of words"
DIGITS = "digits"
SPLITS = {
    (BYTES_OF_WORDS,): "gpt-2",
    (DIGITS, BYTES_OF_WORDS): "smollm",
    (LLAMA_3, BYTES): "llama-bpe",
    (QWEN_2, BYTES): "qwen2",
    (TEKKEN, BYTES): "tekken",
}
"""llama.cpp's names of the rules that split text before the merges, by the steps of tokenizer.json."""
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad")
SPACE = "\u2581"


def add_tokenizer(writer: GGUFWriter, model_dir: Path, *, vocab_size: int) -> None:
    """Add the tokenizer of a model folder. `vocab_size`: rows of the embeddings. Raises UnsupportedModel."""
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise _unsupported("its folder does not contain tokenizer.json")
    content = json.loads(path.read_text("utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise _unsupported(f"it is of the type {model.get('type')!r}, and only BPE is supported")
    _check_normalizer(content)
    tokens, types = _tokens(content, vocab_size)
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, content, tokens)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(content))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(
        model_dir,
        load_merges=not model.get("byte_fallback"),
        special_token_types=SPECIAL_TOKENS,
        n_vocab=vocab_size,
    )
    loaded = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    special.add_special_token = {name: adds(loaded, name) for name in ("bos", "eos")}
    special.add_to_gguf(writer, quiet=True)


def add_sentencepiece_model(model_dir: Path, *, vocab_size: int) -> None:
    """Write tokenizer.model, which llama.cpp's converter requires for SentencePiece, if the folder lacks it.

    Base models from GGUF files have only tokenizer.json. Raises UnsupportedModel if the tokenizer changes text.
    """
    path, source = model_dir / "tokenizer.model", model_dir / "tokenizer.json"
    if path.exists() or not source.is_file():
        return
    content = json.loads(source.read_text("utf-8"))
    if content["model"].get("type") != "BPE" or not content["model"].get("byte_fallback"):
        return
    _check_normalizer(content)
    tokens, types = _tokens(content, vocab_size)
    sentencepiece: Any = import_protobuf()
    proto = sentencepiece.ModelProto()
    for token, kind, score in zip(tokens, types, _scores(content, tokens), strict=True):
        proto.pieces.add(piece=token, type=kind, score=score)  # GGUF numbers the types as SentencePiece does
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = _prepends_space(content)
    proto.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(proto.SerializeToString())


def adds(tokenizer: Any, name: Literal["bos", "eos"]) -> bool:
    """Return whether the tokenizer adds this token to every text. llama.cpp then adds it too."""
    ids = tokenizer("a")["input_ids"]
    return ids[0 if name == "bos" else -1] == getattr(tokenizer, f"{name}_token_id")


def _check_normalizer(content: dict[str, Any]) -> None:
    """Refuse a tokenizer that changes text before it splits it. llama.cpp has no such step for BPE.

    NFC is accepted, because almost all text is in this form. A SentencePiece tokenizer must replace spaces, which
    llama.cpp always does for its own.
    """
    is_sentencepiece = bool(content["model"].get("byte_fallback"))
    normalizers = _steps(content.get("normalizer"), "normalizers")
    for step in normalizers:
        if step["type"] != "NFC" and not (is_sentencepiece and _marks_spaces(step)):
            raise _unsupported(
                f"its normalizer {step['type']!r} changes text before it is split, and llama.cpp has no such step"
            )
    metaspaces = _steps(content.get("pre_tokenizer"), "pretokenizers")
    if is_sentencepiece and not any(step["type"] in ("Replace", "Metaspace") for step in (*normalizers, *metaspaces)):
        raise _unsupported(f"it does not replace spaces by {SPACE!r}, as llama.cpp does for BPE with byte fallback")


def _marks_spaces(step: dict[str, Any]) -> bool:
    """Return whether a normalizer puts SentencePiece's mark before the text or in the place of each space."""
    if step["type"] == "Prepend":
        return step["prepend"] == SPACE
    return step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, SPACE)


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the token and type of each row of the embeddings. Rows without a token get an unused one."""
    is_sentencepiece, unknown = bool(content["model"].get("byte_fallback")), content["model"].get("unk_token")
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    named = [(text, index, TokenType.NORMAL) for text, index in content["model"]["vocab"].items()]
    for added in content.get("added_tokens") or []:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        named.append((added["content"], added["id"], kind))
    for text, index, kind in named:
        if not 0 <= index < vocab_size:
            raise _unsupported(f"its token {text!r} has the ID {index}, but the model has {vocab_size} embeddings")
        tokens[index], types[index] = text, kind
        if is_sentencepiece and text == unknown:
            types[index] = TokenType.UNKNOWN
        elif is_sentencepiece and kind is TokenType.NORMAL and _is_byte(text):
            types[index] = TokenType.BYTE
    return tokens, [int(kind) for kind in types]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _add_sentencepiece(writer: GGUFWriter, content: dict[str, Any], tokens: list[str]) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(_scores(content, tokens))
    writer.add_add_space_prefix(_prepends_space(content))


def _scores(content: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return scores from which llama.cpp derives the order of the merges: the earlier a merge, the higher its score."""
    first: dict[str, int] = {}
    for order, pair in enumerate(content["model"]["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        first.setdefault(left + right, order)
    return [-float(first.get(token, len(first))) for token in tokens]


def _prepends_space(content: dict[str, Any]) -> bool:
    for step in _steps(content.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            return True
    return any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(content.get("pre_tokenizer"), "pretokenizers")
    )


def _split_name(content: dict[str, Any]) -> str:
    steps = tuple(_described(step) for step in _steps(content.get("pre_tokenizer"), "pretokenizers"))
    name = SPLITS.get(steps)
    if name is None:
        raise _unsupported(
            "the rule by which it splits text into words has no name in llama.cpp that Lorry knows; the known ones "
            f"are {', '.join(sorted(SPLITS.values()))}"
        )
    return name


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer in order. key: where a sequence has them."""
    if part is None:
        return []
    return [inner for step in part[key] for inner in _steps(step, key)] if part["type"] == "Sequence" else [part]


def _described(step: dict[str, Any]) -> str:
    """Return a step in the notation of SPLITS. Any other step is described by its type, which matches none."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return BYTES_OF_WORDS if step.get("use_regex", True) else BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return kind


def _unsupported(reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The base model's tokenizer can't be written to a GGUF file: {reason}.",
        remedy="Use the format 'merged', or 'gguf-lora' with a GGUF file of the base model.",
    )

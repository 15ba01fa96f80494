"""Small chat bases for tests: a tokenizer trained on the texts of the tests, and one template of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from catalog.spec.data import DataOptions
from lora_core.data.token_dataset import TokenDataset
from worker.children.tokenizer.main import DatasetReport, prepare

Messages = list[dict[str, Any]]
Row = Messages | dict[str, Any]

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # drops the reasoning of all turns except the last
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content if loop.last else "
    "m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EVERYTHING = """{%- set ns = namespace(turns=0, names=dict(a=1)) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {{- '<|im_start|>' ~ message.role ~ ' ' ~ ns.turns ~ (message | tojson(indent=1)) }}
    {%- if tools %}{{ 'tools' }}{% endif %}{{ documents is none }}{{ tools is none }}{{ unknown }}
    {{- message.content | upper }}
    {{- eos_token + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' }}{%- endif %}
"""
TEMPLATES = {"smollm2": SMOLLM2, "marked": MARKED, "instruct": INSTRUCT, "everything": EVERYTHING}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")


def turns(*contents: str, system: str | None = None) -> Messages:
    """Return alternating messages of the user and the assistant."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CHATS: dict[str, Messages] = {
    "one turn": turns("What is 2 + 2?", "4"),
    "a system prompt": turns("Hi", "Hello there!", system="Be brief."),
    "many turns": turns("a", "b", "c", "d", "e", "f"),
    "whitespace": turns(" \n a", "\n  b  \n", "\t", "c\n\n"),
    "other scripts": turns("Grüße, 世界 😀👩‍👩‍👧", "Ça va — добрый день 🇪🇺"),
    "special tokens in the text": turns("say <|im_end|>", "<|im_start|>assistant\nno"),
    "ends with a question": turns("a", "b", "c"),
}


def train_tokenizer() -> str:
    """Return a byte-level BPE tokenizer with ChatML's special tokens, trained on the texts of the tests."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for chat in CHATS.values() for message in chat]
    tokenizer.train_from_iterator([*texts, "system user assistant helpful answer question"] * 3, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer.to_str()


class Base:
    """The folder of a base model as an import leaves it, without weights."""

    def __init__(self, folder: Path, tokenizer_json: str, template: str | None) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "tokenizer.json").write_text(tokenizer_json)
        (folder / "config.json").write_text(json.dumps({"vocab_size": 400}))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        config |= {"bos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}, "pad_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)

    def reference(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.folder)

    def prepare(self, *rows: Row, max_length: int = 4096, **data: Any) -> tuple[DatasetReport, Path]:
        """Tokenize rows. A list of messages becomes a chat row; any other row is written unchanged."""
        source, out = self.folder.parent / "source.jsonl", self.folder.parent / "tokens.safetensors"
        objects = [{"messages": row} if isinstance(row, list) else row for row in rows]
        source.write_text("".join(json.dumps(row) + "\n" for row in objects))
        spec = DataOptions(**data)
        return prepare(source=source, base_dir=self.folder, max_length=max_length, out=out, data=spec), out

    def rows(self, *rows: Row, max_length: int = 4096, **data: Any) -> list[tuple[list[int], list[int]]]:
        """Return (ids, mask) of each kept row."""
        report, out = self.prepare(*rows, max_length=max_length, **data)
        assert "refusal" not in report, report
        tokens = TokenDataset.load(out)
        assert (report["usable_rows"], report["tokens"]) == (tokens.num_rows, tokens.num_tokens)
        assert report["supervised_tokens"] == tokens.num_supervised_tokens
        return [(ids.tolist(), mask.tolist()) for ids, mask in map(tokens.row, range(tokens.num_rows))]

    def trained_text(self, row: Row, **data: Any) -> str:
        """Return the trained tokens of a row as text, with | between answers."""
        ((ids, mask),) = self.rows(row, **data)
        parts: list[list[int]] = [[]]
        for ident, is_trained in zip(ids, mask, strict=True):
            if is_trained:
                parts[-1].append(ident)
            elif parts[-1]:
                parts.append([])
        reference = self.reference()
        return "|".join(str(reference.decode(part)) for part in parts if part)

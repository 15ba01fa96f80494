"""Tokenization of chats: the same tokens as transformers, and only the answers are trained on."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_core.data.token_dataset import TokenDataset
from tests.services.small_disk import small_disk
from tests.worker.chat_bases import (
    CHATS,
    FORGETFUL,
    INSTRUCT,
    MARKED,
    SMOLLM2,
    TEMPLATES,
    Base,
    Messages,
    turns,
)
from worker.children.tokenizer.main import Refusal
from worker.protocol.errors import EXIT_DISK_FULL


def refusal(base: Base, *rows: Messages, max_length: int = 4096) -> Refusal:
    report, out = base.prepare(*rows, max_length=max_length)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if "tmp" in path.name] == []
    found = report.get("refusal")
    assert found is not None, report
    assert found["remedy"].endswith(".")
    return found


REFUSED = ("instruct", "a system prompt")


@pytest.mark.parametrize(("name", "chat"), [pair for pair in product(TEMPLATES, CHATS) if pair != REFUSED])
def test_tokens_equal_those_of_transformers(make_base: Any, name: str, chat: str) -> None:
    base: Base = make_base(TEMPLATES[name])

    ((ids, _),) = base.rows(CHATS[chat])

    assert ids == base.reference().apply_chat_template(CHATS[chat], return_dict=False)


@pytest.mark.parametrize("chat", CHATS)
def test_marked_answers_equal_those_of_transformers(make_base: Any, chat: str) -> None:
    base: Base = make_base(MARKED)

    ((ids, mask),) = base.rows(CHATS[chat])

    expected: Any = base.reference().apply_chat_template(
        CHATS[chat], return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize("chat", CHATS)
def test_answers_found_by_prefixes_equal_the_marked_ones(
    tmp_path: Path, tokenizer_json: str, make_base: Any, chat: str
) -> None:
    plain: Base = make_base(MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""))
    marked = Base(tmp_path / "marked", tokenizer_json, MARKED)

    assert plain.rows(CHATS[chat]) == marked.rows(CHATS[chat])
    assert plain.prepare(CHATS[chat])[0].get("answers_by") == "prefixes"
    assert marked.prepare(CHATS[chat])[0].get("answers_by") == "generation blocks"


GENERATION_IN_A_MACRO = (
    "{% macro of(m) %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{% set text = of(m) if m.role == 'assistant' else m.content %}{{ text }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "chat", "trained"),
    [
        (TEMPLATES["smollm2"], ("What?", "4", "Why?", "Because."), "4<|im_end|>|Because.<|im_end|>"),
        (TEMPLATES["marked"], ("What?", "4", "Why?", "Because."), "4<|im_end|>|Because.<|im_end|>"),
        (INSTRUCT, ("a", "b ", "c", "d"), " b<|im_end|>| d<|im_end|>"),  # it has no marker of the prompt
        (GENERATION_IN_A_MACRO, ("question", "answer", "more", "again"), "answer<|im_end|>|again<|im_end|>"),
    ],
)
def test_answers_and_the_end_of_their_turns_are_trained_on(
    make_base: Any, template: str, chat: tuple[str, ...], trained: str
) -> None:
    base: Base = make_base(template)

    assert base.trained_text(turns(*chat)) == trained


@pytest.mark.parametrize("name", ["smollm2", "marked"])
def test_a_turn_of_weight_0_is_not_trained_on(make_base: Any, name: str) -> None:
    base: Base = make_base(TEMPLATES[name])
    chat = turns("a", "wrong", "b", "right")
    chat[1]["weight"] = 0
    chat[3]["weight"] = 1

    assert base.trained_text(chat) == "right<|im_end|>"


@pytest.mark.parametrize("name", ["smollm2", "marked"])
def test_a_conversation_may_start_with_the_assistant(make_base: Any, name: str) -> None:
    base: Base = make_base(TEMPLATES[name])

    chat = [{"role": "assistant", "content": "Hi!"}, *turns("a", "b")]

    assert base.trained_text(chat) == "Hi!<|im_end|>|b<|im_end|>"


def test_the_developer_role_equals_the_system_role(make_base: Any) -> None:
    base: Base = make_base(SMOLLM2)

    assert base.rows([{"role": "developer", "content": "x"}, *turns("a", "b")]) == base.rows(
        turns("a", "b", system="x")
    )


def test_the_first_token_of_a_row_is_never_trained_on(make_base: Any) -> None:
    base: Base = make_base("{% for m in messages %}{{ m.content }}{% endfor %}")

    ((ids, mask),) = base.rows([{"role": "assistant", "content": "b c d e"}])

    assert mask == [0] + [1] * (len(ids) - 1)


def test_a_long_row_keeps_its_start(make_base: Any) -> None:
    base: Base = make_base(SMOLLM2)
    chat = turns("a", "long " * 50, system="s")
    ((ids, mask),) = base.rows(chat)

    assert base.rows(chat, max_length=30) == [(ids[:30], mask[:30])]
    assert base.prepare(chat, max_length=30)[0]["truncated_rows"] == 1
    assert base.prepare(chat, max_length=len(ids))[0]["truncated_rows"] == 0


def test_rows_without_trainable_tokens_are_dropped_and_counted(make_base: Any) -> None:
    base: Base = make_base(SMOLLM2)
    masked, good = turns("a", "masked", system="s"), turns("a", "b", system="s")
    masked[-1]["weight"] = 0
    cut = turns("long " * 50, "b", system="s")

    report, out = base.prepare(masked, good, cut, good, max_length=40)

    assert (report["rows"], report["usable_rows"], report["empty_rows"], report["duplicate_rows"]) == (4, 2, 2, 1)
    assert report["truncated_rows"] == 1
    assert report["longest_row"] == len(base.reference().apply_chat_template(cut, return_dict=False))
    assert report["median_row"] == len(base.reference().apply_chat_template(good, return_dict=False))
    assert TokenDataset.load(out).num_rows == 2


def test_a_file_without_trainable_tokens_is_rejected_with_a_remedy(make_base: Any) -> None:
    base: Base = make_base(SMOLLM2)
    masked = turns("a", "masked")
    masked[-1]["weight"] = 0

    assert refusal(base, masked, masked)["code"] == "nothing_to_learn"
    cut = refusal(base, turns("a", "b"), max_length=10)
    assert cut["code"] == "nothing_to_learn"
    assert "first 10 tokens" in cut["message"]
    assert "the longest row has" in cut["remedy"]


def test_a_base_without_a_chat_template_is_rejected(make_base: Any) -> None:
    assert refusal(make_base(None), turns("a", "b"))["code"] == "base_has_no_chat_template"


def test_a_template_that_rewrites_earlier_turns_is_rejected_with_the_line(make_base: Any) -> None:
    base: Base = make_base(FORGETFUL)
    thinking = turns("a", "<think>1</think>b", "c", "<think>2</think>d")

    found = refusal(base, turns("a", "b"), thinking)

    assert found["code"] == "unusable_chat_template"
    assert found["message"].startswith("Line 2: ")
    assert "last_turn" in found["remedy"]
    assert base.trained_text(turns("a", "<think>1</think>b")) == "<think>1</think>b<|im_end|>"


def test_last_turn_is_not_suggested_if_the_template_rules_it_out(make_base: Any) -> None:
    base: Base = make_base("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")

    found = refusal(base, turns("a", "b"))

    assert found["code"] == "unusable_chat_template"
    assert "before an answer" in found["message"]
    assert "last_turn" not in found["remedy"]


def test_a_row_that_the_template_rejects_is_named(make_base: Any) -> None:
    base: Base = make_base(INSTRUCT)

    found = refusal(base, turns("a", "b"), turns("a", "b", system="s"))

    assert found["code"] == "unusable_chat_template"
    assert found["message"].startswith("Line 2: ")
    assert "Only user and assistant roles are supported!" in found["message"]


BAD_TEMPLATES = {
    "with a syntax error": "{% for m in messages %}",
    "with a sandbox escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "that mutates its messages": "{{ messages.append(1) }}",
    "with infinite recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "that hides its answers": "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
    "that shortens its answers": "{% set x %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{% endset %}{{ x[:2] }}",
}  # fmt: skip


@pytest.mark.parametrize("template", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_bad_template_is_rejected_without_harm(make_base: Any, template: str) -> None:
    found = refusal(make_base(template), turns("question", "answer"))

    assert found["code"] in ("unusable_chat_template", "unusable_chat_template", "nothing_to_learn")


def test_weights_need_a_template_that_marks_every_answer(make_base: Any) -> None:
    base: Base = make_base(
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = turns("a", "b", "c", "d")
    weighted = turns("a", "b", "c", "d")
    weighted[1]["weight"] = 0

    assert refusal(base, weighted)["code"] == "unusable_chat_template"
    assert base.trained_text(chat) == "d"


def test_a_token_outside_the_base_vocabulary_is_rejected(make_base: Any) -> None:
    base: Base = make_base(SMOLLM2)
    (base.folder / "config.json").write_text(json.dumps({"vocab_size": 60}))

    assert refusal(base, turns("question", "answer"))["code"] == "unusable_chat_template"


def test_an_invalid_row_is_rejected_with_its_line(make_base: Any) -> None:
    found = refusal(make_base(SMOLLM2), turns("a", "b"), [{"role": "bot", "content": "x"}])

    assert (found["code"], found["message"]) == (
        "invalid_row",
        "Line 2: messages[0].role is 'bot', which is not a valid role.",
    )


def test_the_template_may_be_in_the_tokenizer_configuration(make_base: Any) -> None:
    base: Base = make_base(None)
    path = base.folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": SMOLLM2}]

    for template in (SMOLLM2, named):
        path.write_text(json.dumps({**config, "chat_template": template}))
        assert base.trained_text(turns("a", "b")) == "b<|im_end|>"


def test_the_same_file_gives_the_same_bytes_on_any_day(make_base: Any) -> None:
    base: Base = make_base("{{ strftime_now('%d %b %Y') }}\n" + SMOLLM2)
    rows = list(CHATS.values())

    report, out = base.prepare(*rows)
    first = out.read_bytes()
    again, _ = base.prepare(*rows)

    assert out.read_bytes() == first
    assert again == report
    assert report.get("template_date") == "2024-07-26"
    assert "26 Jul 2024" in str(base.reference().decode(TokenDataset.load(out).row(0)[0].tolist()))


def test_rows_do_not_depend_on_batching(make_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Base = make_base(SMOLLM2)
    _, out = base.prepare(*CHATS.values())
    together = out.read_bytes()

    monkeypatch.setattr("worker.children.tokenizer.main.BATCH_ROWS", 2)
    base.prepare(*CHATS.values())

    assert out.read_bytes() == together


def test_the_file_is_safetensors_with_three_tensors(make_base: Any) -> None:
    _, out = make_base(SMOLLM2).prepare(turns("a", "b"), turns("c", "d"))

    tensors = load_file(out)

    kinds = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    assert kinds == {
        "input_ids": (np.dtype(np.int32), 1),
        "loss_mask": (np.dtype(np.uint8), 1),
        "row_offsets": (np.dtype(np.int64), 1),
    }
    assert int.from_bytes(out.read_bytes()[:8], "little") % 8 == 0


def run_child(base: Base, out: Path, *rows: Messages) -> tuple[int, Path]:
    folder = base.folder.parent
    (folder / "source.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    arguments: dict[str, Any] = {"source": folder / "source.jsonl", "base_dir": base.folder, "out": out}
    arguments |= {"result": folder / "report.json", "details": folder / "details.json", "max_length": 512, "data": {}}
    (folder / "arguments.json").write_text(json.dumps(arguments, default=str))
    program = (
        "import runpy, sys; sys.argv[1:] = [sys.argv[1]]\n"
        "try: runpy.run_module('worker.children.tokenizer.main', run_name='__main__')\n"
        "finally: print(sorted(m for m in ('torch', 'transformers', 'lora_core') if m in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, folder / "arguments.json"], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "[]\n", ran.stderr
    return ran.returncode, folder / "report.json"


def test_a_child_prepares_a_file_without_torch(make_base: Any, tmp_path: Path) -> None:
    out = tmp_path / "tokens.safetensors"

    status, report = run_child(make_base(SMOLLM2), out, turns("a", "b"))

    assert status == 0
    assert json.loads(report.read_text())["usable_rows"] == TokenDataset.load(out).num_rows == 1


def test_a_rejected_file_does_not_fail_the_child(make_base: Any, tmp_path: Path) -> None:
    status, report = run_child(make_base(None), tmp_path / "tokens.safetensors", turns("a", "b"))

    assert status == 0
    assert json.loads(report.read_text())["refusal"]["code"] == "base_has_no_chat_template"


def test_a_full_disk_is_not_reported_as_a_bad_file(make_base: Any, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32_768) as disk:
        status, report = run_child(make_base(SMOLLM2), disk / "tokens.safetensors", *[turns("a", "word " * 90)] * 100)

        assert status == EXIT_DISK_FULL
        assert not report.exists()
        assert list(disk.iterdir()) == []

"""Which turns of a chat are trained on, and how rows that are too long are handled."""

from typing import Any

import pytest

from tests.worker.chat_bases import FORGETFUL, MARKED, SMOLLM2, Base, turns

END = "<|im_end|>"


@pytest.mark.parametrize("template", [SMOLLM2, MARKED], ids=["prefixes", "marked"])
def test_training_can_be_limited_to_the_last_turn(make_base: Any, template: str) -> None:
    base: Base = make_base(template)
    chat = turns("a", "first", "b", "last", "c")

    assert base.trained_text(chat, loss="assistant") == f"first{END}|last{END}"
    assert base.trained_text(chat, loss="last_turn") == f"last{END}"
    assert base.rows(chat, loss="last_turn")[0][0] == base.rows(chat)[0][0]
    assert base.prepare(chat, loss="last_turn")[0]["loss"] == "last_turn"


def test_a_last_turn_of_weight_0_leaves_no_trainable_tokens(make_base: Any) -> None:
    masked = turns("a", "first", "b", "last")
    masked[-1]["weight"] = 0

    report, _ = make_base(SMOLLM2).prepare(masked, turns("a", "b"), loss="last_turn")

    assert (report["usable_rows"], report["empty_rows"]) == (1, 1)


def test_a_template_that_rewrites_earlier_turns_works_with_last_turn(make_base: Any) -> None:
    base: Base = make_base(FORGETFUL)
    thinking = turns("a", "<think>1</think>b", "c", "<think>2</think>d")

    assert "last_turn" in (base.prepare(thinking)[0].get("refusal") or {}).get("remedy", "")
    assert base.trained_text(thinking, loss="last_turn") == f"<think>2</think>d{END}"


def test_long_rows_are_dropped_if_requested(make_base: Any) -> None:
    base: Base = make_base(SMOLLM2)
    short, long = turns("a", "b", system="s"), turns("a", "b " * 50, system="s")

    report, _ = base.prepare(long, short, max_length=40, overflow="drop")

    assert (report["rows"], report["usable_rows"], report["dropped_rows"]) == (2, 1, 1)
    assert (report["truncated_rows"], report["split_rows"], report["empty_rows"]) == (0, 0, 0)
    assert base.rows(long, short, max_length=40, overflow="drop") == base.rows(short)


def test_a_file_whose_rows_are_all_dropped_is_rejected(make_base: Any) -> None:
    report, out = make_base(SMOLLM2).prepare(turns("a", "b " * 50), max_length=20, overflow="drop")

    refused = report.get("refusal")
    assert refused is not None
    assert refused["message"].startswith("No rows are left to train on: of 1 rows, 1 have more than 20 tokens")
    assert not out.exists()


def test_a_long_text_is_split_into_consecutive_rows(make_base: Any) -> None:
    base: Base = make_base(None)
    text = {"text": "a b c d e f g h " * 5}
    ((ids, _),) = base.rows(text)

    rows = base.rows(text, max_length=8, overflow="split")

    assert [ident for piece, _ in rows for ident in piece] == ids
    assert {len(piece) for piece, _ in rows[:-1]} == {8}
    assert all(mask == [0] + [1] * (len(piece) - 1) for piece, mask in rows)
    report, _ = base.prepare(text, {"text": "a b"}, max_length=8, overflow="split")
    assert (report["rows"], report["split_rows"], report["usable_rows"]) == (2, 1, len(rows) + 1)


def test_a_piece_of_one_token_is_dropped_and_counted(make_base: Any) -> None:
    base: Base = make_base(None)
    text = {"text": "a b c d e f g h " * 5}
    ((ids, _),) = base.rows(text)

    report, _ = base.prepare(text, max_length=len(ids) - 1, overflow="split")

    assert (report["usable_rows"], report["empty_rows"], report["tokens"]) == (1, 1, len(ids) - 1)

"""Tokenization of preference pairs: both answers follow one prompt, and only the answers are trained on."""

from pathlib import Path
from typing import Any

from lora_core.data.token_dataset import TokenDataset
from tests.worker.chat_bases import Base, turns


def pair(prompt: list[Any], preferred: str, rejected: str) -> dict[str, Any]:
    preferred_output, non_preferred_output = (
        [{"role": "assistant", "content": answer}] for answer in (preferred, rejected)
    )
    messages = {"messages": prompt}
    return {"input": messages, "preferred_output": preferred_output, "non_preferred_output": non_preferred_output}


def tokens(base: Base, out: Path) -> list[tuple[list[int], str]]:
    """Return (ids, trained text) of each row."""
    data = TokenDataset.load(out)
    found: list[tuple[list[int], str]] = []
    for ids, mask in map(data.row, range(data.num_rows)):
        found.append((ids.tolist(), str(base.reference().decode(ids[mask.astype(bool)].tolist()))))
    return found


def test_a_pair_becomes_two_rows_with_only_the_answers_trained_on(base: Base) -> None:
    prompt = turns("Hi", "Hello", "What is 2 + 2?", system="Be brief.")

    report, out = base.prepare(pair(prompt, "4", "five"))

    chosen, rejected = tokens(base, out)
    for (ids, trained), answer in ((chosen, "4"), (rejected, "five")):
        conversation = [*prompt, {"role": "assistant", "content": answer}]
        assert ids == base.reference().apply_chat_template(conversation, return_dict=False)
        assert trained == f"{answer}<|im_end|>"
    assert (report["rows"], report["usable_rows"], report.get("kind")) == (1, 1, "preference")
    assert report["longest_example"] == len(chosen[0]) + len(rejected[0])
    assert report["longest_row"] == max(len(chosen[0]), len(rejected[0]))


def test_a_pair_that_truncation_makes_unusable_is_dropped_and_counted(base: Base) -> None:
    short = pair(turns("a", system="s"), "b", "c")
    long_prompt = pair(turns("long " * 60, system="s"), "b", "c")
    alike_once_cut = pair(turns("a", system="s"), "x " * 60 + "b", "x " * 60 + "c")
    one_is_long = pair(turns("a", system="s"), "b", "long " * 60)

    report, out = base.prepare(short, long_prompt, alike_once_cut, one_is_long, short, max_length=40)

    assert (report["rows"], report["usable_rows"], report["empty_rows"]) == (5, 3, 2)
    assert (report["truncated_rows"], report["duplicate_rows"]) == (3, 1)
    assert TokenDataset.load(out).num_rows == 6
    assert [trained for _, trained in tokens(base, out)[:2]] == ["b<|im_end|>", "c<|im_end|>"]


def test_a_file_whose_pairs_are_all_dropped_is_rejected_with_a_remedy(base: Base) -> None:
    report, out = base.prepare(pair(turns("long " * 60, system="s"), "b", "c"), max_length=20)

    found = report.get("refusal")
    assert found is not None
    assert (found["code"], out.exists()) == ("nothing_to_learn", False)
    assert "raise max_length" in found["remedy"]


def test_a_pair_among_chats_is_rejected_with_its_line(base: Base) -> None:
    report, _ = base.prepare(turns("a", "b"), pair(turns("a", system="s"), "b", "c"))

    found = report.get("refusal")
    assert found is not None
    assert found["code"] == "invalid_row"
    assert found["message"].startswith("Line 2: ")

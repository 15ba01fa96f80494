"""Tokenization of preference pairs and labeled answers: only the answers after the prompt are trained on."""

from pathlib import Path
from typing import Any

import pytest

from catalog.spec.job import JobRequest, resolve
from lora_core.config import ObjectiveConfig
from lora_core.data.kto_pairs import check_unpaired
from lora_core.data.token_dataset import TokenDataset
from lora_core.events import JobStepped, Rewards
from tests.worker.chat_bases import Base, turns
from worker.children.trainer.job_config import objective_config
from worker.children.trainer.outputs import as_json


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


def example(prompt: list[Any] | str, answer: str, *, label: bool) -> dict[str, Any]:
    completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "completion": completion, "label": label}


def trained_texts(base: Base, data: TokenDataset) -> list[str]:
    rows = map(data.row, range(data.num_rows))
    return [str(base.reference().decode(ids[mask.astype(bool)].tolist())) for ids, mask in rows]


def test_only_the_last_answer_is_trained_on_and_its_label_is_kept(base: Base) -> None:
    prompt = turns("Hi", "Hello", "What is 2 + 2?", system="Be brief.")

    report, out = base.prepare(example(prompt, "4", label=True), example(prompt, "five", label=False))

    data = TokenDataset.load(out)
    conversation = [*prompt, {"role": "assistant", "content": "4"}]
    assert data.row(0)[0].tolist() == base.reference().apply_chat_template(conversation, return_dict=False)
    assert trained_texts(base, data) == ["4<|im_end|>", "five<|im_end|>"]
    assert data.labels is not None
    assert data.labels.tolist() == [1.0, 0.0]
    check_unpaired(data)
    assert (report.get("kind"), report["usable_rows"], report.get("desirable_rows")) == ("unpaired", 2, 1)


def test_plain_text_is_joined_unchanged_and_a_cut_off_answer_loses_its_label(base: Base) -> None:
    rows = [example("a", " b", label=True), example("long " * 60, " c", label=True), example("a", " b", label=False)]

    report, out = base.prepare(*rows, max_length=20)

    data = TokenDataset.load(out)
    assert data.labels is not None
    assert data.labels.tolist() == [1.0, 0.0]
    assert (report["empty_rows"], report["duplicate_rows"]) == (1, 0), (
        "the same answer with another label is not a duplicate"
    )
    assert all(text.startswith(" b") for text in trained_texts(base, data))


@pytest.mark.parametrize(("label", "instead"), [(True, "supervised"), (False, "remove the file")])
def test_a_file_with_a_single_label_is_rejected_with_a_remedy(base: Base, label: bool, instead: str) -> None:
    cut_off = example("long " * 60, " c", label=not label)

    report, out = base.prepare(example("a", " b", label=label), example("c", " d", label=label), cut_off, max_length=20)

    found = report.get("refusal")
    assert found is not None
    assert (found["code"], out.exists()) == ("nothing_to_learn", False)
    assert f"All 2 answers that are trained on have the label {str(label).lower()}" in found["message"]
    assert instead in found["remedy"]


def test_kto_hyperparameters_reach_the_engine() -> None:
    numbers = {"beta": 0.2, "desirable_weight": 1.3}
    method = {"type": "kto", "kto": {"hyperparameters": numbers}}
    request = JobRequest.model_validate({"model": "m", "training_file": "f", "method": method})

    found = objective_config(resolve(request, num_rows=10, max_positions=None, seed=1))

    assert found == ObjectiveConfig(kind="kto", beta=0.2, desirable_weight=1.3)


def test_rewards_without_answers_are_omitted() -> None:
    rewards = Rewards(chosen=0.5, rejected=None, margin=None, accuracy=1.0, kl=0.25)
    event = JobStepped(
        job="j",
        step=1,
        loss=0.5,
        learning_rate=0.1,
        grad_norm=1.0,
        num_tokens=9,
        num_supervised_tokens=4,
        token_accuracy=0.5,
        rewards=rewards,
    )

    assert as_json(event)["rewards"] == {"chosen": 0.5, "accuracy": 1.0, "kl": 0.25}

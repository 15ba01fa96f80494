"""Answers equal those of transformers and PEFT, do not depend on other jobs, and do not affect training."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError, OutOfMemory
from lora_core.events import JobEvaluated
from lora_core.forward import continuous_batch
from lora_core.forward.generation import Prompts
from lora_core.layers.attention.cached import attend_last
from lora_core.layers.attention.packed import attend
from tests.lora_core.scenarios import VOCAB, admit, rename, run_alone, state_bytes, submissions
from tests.lora_core.test_families import FAMILIES
from tests.tiny_models import save

PROMPTS = Prompts(prompts=((3, 14, 15, 92, 65), (7,), tuple(range(40, 75))), max_tokens=9)


def answered(engine: Engine, requests: dict[str, Prompts]) -> dict[str, list[tuple[int, ...]]]:
    generation = engine.generation(requests)
    while not generation.is_complete:
        generation.advance()
    return generation.answers()


def trained(base, names: list[str], *, token_budget: int = 4096) -> Engine:
    engine = Engine(base, EngineConfig(token_budget=token_budget))
    jobs = submissions("llama" if "Llama" in type(base.model).__name__ else "gpt2")
    for name in names:
        admit(engine, name, jobs[name])
    while not engine.idle:
        engine.tick()
    return engine


def greedy(model, requests: Prompts) -> list[tuple[int, ...]]:
    answers = []
    for prompt in requests.prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=requests.max_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(tuple(whole[0, len(prompt) :].tolist()))
    return answers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trained_adapter_gives_the_answers_of_peft_and_transformers(load, base_dirs, tmp_path, family):
    engine = trained(load(family), ["plain"])
    engine.export("plain", tmp_path / "adapter", base_name="base")
    reference = AutoModelForCausalLM.from_pretrained(base_dirs[family])
    of_base = greedy(reference, PROMPTS)

    of_adapter = greedy(PeftModel.from_pretrained(reference, tmp_path / "adapter"), PROMPTS)

    assert answered(engine, {"plain": PROMPTS}) == {"plain": of_adapter}
    assert of_adapter != of_base


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_base_of_any_family_gives_the_answers_of_transformers(tmp_path, family):
    folder = save(family, tmp_path / "base", **FAMILIES[family])
    engine = Engine(load_base(folder, dtype="float32", device="cpu"), EngineConfig())
    admit(engine, "fresh", submissions("llama")["wide"])

    found = answered(engine, {"fresh": PROMPTS})

    assert found == {"fresh": greedy(AutoModelForCausalLM.from_pretrained(folder), PROMPTS)}


@pytest.mark.parametrize("window", [None, 1, 5, 99])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
def test_attention_of_the_last_token_equals_that_in_a_full_sequence(window, softcap, heads):
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(count, 17, size, generator=generator)
        for count, size in zip((*heads, heads[1]), (8, 8, 12), strict=True)
    )
    options = {"scale": 0.6, "window": window, "softcap": softcap}

    whole = attend(query, key, value, causal=True, **options)

    torch.testing.assert_close(attend_last(query[:, -1:], key, value, **options), whole[:, -1:])


def test_each_token_after_the_first_takes_a_one_token_pass_per_answer(load, monkeypatch):
    engine = trained(load("llama"), ["plain"])
    passes = spy_on_passes(monkeypatch)

    answered(engine, {"plain": PROMPTS})

    assert passes == [(5, 1, 35, 7), *[(1, 1, 1, 13)] * 8]


def test_prompts_whose_answers_do_not_fit_together_wait_in_order(load, monkeypatch):
    engine = trained(load("llama"), ["plain", "tiny"], token_budget=100)
    passes = spy_on_passes(monkeypatch)

    answered(engine, {"plain": PROMPTS, "tiny": PROMPTS})

    assert [lengths[:-1] for lengths in passes] == [(5, 1, 35, 5, 1), *[(1,) * 5] * 8, (35,), *[(1,)] * 8]


def spy_on_passes(monkeypatch) -> list[tuple[int, ...]]:
    """Return a list that collects the sequence lengths of each pass, with the padding last."""
    passes: list[tuple[int, ...]] = []
    original = continuous_batch.hidden_states

    def spied(base, pack):
        passes.append(pack.sequence_lengths)
        return original(base, pack)

    monkeypatch.setattr(continuous_batch, "hidden_states", spied)
    return passes


@pytest.mark.parametrize("failing", [1, 2, 5])
def test_out_of_memory_at_any_token_does_not_change_an_answer(load, monkeypatch, failing):
    engine = trained(load("llama", "bfloat16"), ["plain", "tiny", "dora"])
    requests: dict[str, Prompts] = dict.fromkeys(["plain", "tiny", "dora"], PROMPTS)
    expected, calls = answered(engine, requests), []
    original = continuous_batch.hidden_states

    def starved(base, pack):
        h_TD = original(base, pack)  # the pass fails after the keys are written
        calls.append(pack.sequence_lengths)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("no memory")
        return h_TD

    monkeypatch.setattr(continuous_batch, "hidden_states", starved)

    assert answered(engine, requests) == expected
    assert calls[failing][:3] == (5, 1, 35), "the answers start again"


@pytest.mark.parametrize(("invariance", "num_kept"), [("bitwise", 0), ("allclose", 2)])
def test_answers_that_restart_keep_their_tokens_unless_bits_repeat(load, monkeypatch, invariance, num_kept):
    engine = trained(load("llama"), ["plain"])
    engine.invariance = invariance
    passes = spy_on_passes(monkeypatch)
    spied = continuous_batch.hidden_states

    def starved(base, pack):
        h_TD = spied(base, pack)
        if len(passes) == 3:
            raise torch.OutOfMemoryError("no memory")
        return h_TD

    monkeypatch.setattr(continuous_batch, "hidden_states", starved)

    answered(engine, {"plain": PROMPTS})

    assert passes[3][:2] == (5 + num_kept, 1 + num_kept), "the third restarts later"


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("token_budget", [4096, 1])
def test_answer_does_not_depend_on_other_answered_jobs(load, dtype, token_budget):
    names = ["plain", "dropout", "dora", "head", "tokens"]
    engine = trained(load("llama", dtype), names, token_budget=token_budget)
    requests = {
        name: Prompts(prompts=PROMPTS.prompts[index % 3 :], max_tokens=3 + index) for index, name in enumerate(names)
    }

    together = answered(engine, requests)

    assert together == {name: answered(engine, {name: prompts})[name] for name, prompts in requests.items()}
    assert len({tuple(answers[-1][:3]) for answers in together.values()}) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_at_every_evaluation_change_no_bit_of_training(load, family):
    base, job = load(family), submissions(family)["wide"]
    alone = run_alone(base, job)
    engine = Engine(base, EngineConfig(token_budget=4096))
    admit(engine, "job", job)
    events, samples = [], []

    while not engine.idle:
        new = engine.tick()
        events += new
        if any(isinstance(event, JobEvaluated) for event in new):
            samples.append(answered(engine, {"job": PROMPTS}))

    assert rename(events, "job") == alone.events
    assert state_bytes(engine, "job") == alone.vectors
    assert len(samples) > 1
    assert samples[0] != samples[-1]


def test_answer_stops_at_the_end_token_and_others_continue(load):
    engine = trained(load("llama"), ["plain"])
    (whole, *others) = answered(engine, {"plain": PROMPTS})["plain"]
    end = whole[4]

    ended, *rest = answered(
        engine, {"plain": Prompts(prompts=PROMPTS.prompts, max_tokens=9, end_ids=frozenset({end}))}
    )["plain"]

    assert ended == whole[: whole.index(end) + 1]
    assert [answer for answer in rest if end not in answer] == [answer for answer in others if end not in answer]


def test_generation_advances_by_token_and_a_job_can_leave_at_any(load):
    engine = trained(load("llama"), ["plain", "tiny"])
    generation = engine.generation({"plain": PROMPTS, "tiny": PROMPTS})
    generation.advance()
    assert {len(answer) for answers in generation.answers().values() for answer in answers} == {1}

    generation.drop("tiny")
    engine.evict("tiny")
    while not generation.is_complete:
        generation.advance()

    assert generation.answers() == answered(engine, {"plain": PROMPTS})


def test_out_of_memory_reduces_the_number_of_jobs_answered_at_once(load, monkeypatch):
    engine = trained(load("llama"), ["plain", "tiny"])
    expected = answered(engine, {"plain": PROMPTS, "tiny": PROMPTS})

    def starved(base, pack):
        if pack.input_ids.numel() > limit:
            raise torch.OutOfMemoryError("no memory")
        return whole(base, pack)

    whole, limit = continuous_batch.hidden_states, 64
    monkeypatch.setattr(continuous_batch, "hidden_states", starved)

    assert answered(engine, {"plain": PROMPTS, "tiny": PROMPTS}) == expected
    limit = 16
    with pytest.raises(OutOfMemory) as raised:
        answered(engine, {"plain": PROMPTS, "tiny": PROMPTS})
    assert raised.value.job == "plain"


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "reason"),
    [
        ((), 1, "at least one prompt"),
        (((1,),), 0, "max_tokens of at least 1"),
        (((1,), ()), 1, "Prompt 2 is empty"),
        (((VOCAB,),), 1, "not between 0 and"),
        (((-1,),), 1, "not between 0 and"),
        (((1,) * 200,), 57, "exceeds the base model's maximum of 256"),
    ],
)
def test_invalid_prompts_are_rejected(load, prompts, max_tokens, reason):
    engine = trained(load("llama"), ["tiny"])

    with pytest.raises(ConfigError, match=reason):
        engine.generation({"tiny": Prompts(prompts=prompts, max_tokens=max_tokens)})

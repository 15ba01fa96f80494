"""Invariants of a job that continues an adapter: it starts as that adapter, and trains like any other job."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_core.adapter import flat_adapter
from lora_core.base_model.model import load_base
from lora_core.config import LoraConfig, ObjectiveConfig
from lora_core.data.token_dataset import TokenDataset, rows_of_step
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BadCheckpoint
from lora_core.events import JobEvaluated
from lora_core.peft_format.export import packed_logits, pseudo_random_ids
from lora_core.peft_format.load_parent import lora_config_of
from lora_core.peft_format.verify import verify_export
from tests.lora_core.classifiers import classified
from tests.lora_core.engine.test_resumed_equals_uninterrupted import finish_elsewhere
from tests.lora_core.exports import trained
from tests.lora_core.parents import DPO, METHODS, child_of, make_parent, parent_job, save_by_peft, stateless
from tests.lora_core.scenarios import (
    Submission,
    admit,
    config,
    dataset,
    preferences,
    rename,
    run_alone,
    run_elastically,
    weights,
)


def logits(engine: Engine, job: str = "job") -> torch.Tensor:
    ids = pseudo_random_ids(engine.base, "test", 1)
    return packed_logits(engine.base, engine._jobs[job].adapter, ids)


def begun(base, job: Submission) -> Engine:
    engine = Engine(base, EngineConfig())
    admit(engine, "job", job)
    return engine


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32")])
@pytest.mark.parametrize("method", METHODS)
def test_child_equals_its_parent_before_its_first_step(load, tmp_path, monkeypatch, family, dtype, method):
    base = load(family, dtype)
    parent = make_parent(base, tmp_path / "parent", method)
    if method == "pissa":  # multiplies the A of siblings one by one, and its child multiplies them jointly
        joined = logits(begun(base, child_of(tmp_path / "parent")))
        monkeypatch.setattr(flat_adapter, "_joint", lambda _sites: None)
        torch.testing.assert_close(joined, logits(parent), rtol=1e-5, atol=1e-5 if dtype == "float32" else 1e-2)

    child = begun(base, child_of(tmp_path / "parent"))

    assert torch.equal(logits(child), logits(parent))
    assert not torch.allclose(logits(child), logits(begun(base, parent_job("lora"))), atol=1e-4)
    adapter = child._jobs["job"].adapter
    assert not any(state.any() for state in (adapter.g, adapter.m, adapter.v)), "the optimizer's state starts at zero"


@pytest.mark.parametrize("method", ["lora", "patterns", "dora", "in_full", "tokens"])
def test_parent_and_child_of_one_epoch_each_equal_one_job_of_two_epochs(load, tmp_path, method):
    """The second epoch has a different order than the first, so the child's rows are arranged to follow that order."""
    base, rows = load("llama"), dataset(52, [14, 31, 9, 22, 17, 40])
    lora = replace(config().lora, **METHODS[method])
    whole = trained(base, Submission(config=stateless(lora, num_steps=6), train=rows))
    parent = trained(base, Submission(config=stateless(lora, num_steps=3), train=rows))
    parent.export("job", tmp_path / "parent", base_name="tiny")

    child_config = stateless(lora_config_of(tmp_path / "parent"), num_steps=3)
    ordered = rows_in_order_of_second_epoch(rows, seed=child_config.seed, batch_size=2)
    child = trained(base, Submission(config=child_config, train=ordered, parent=tmp_path / "parent"))

    assert not torch.equal(weights(parent, "job"), weights(whole, "job"))
    assert torch.equal(weights(child, "job"), weights(whole, "job"))


def rows_in_order_of_second_epoch(rows: TokenDataset, *, seed: int, batch_size: int) -> TokenDataset:
    steps, count = rows.num_rows // batch_size, rows.num_rows
    order = {"num_rows": count, "batch_size": batch_size, "seed": seed}
    first = [row for step in range(steps) for row in rows_of_step(step=step, **order)]
    second = [row for step in range(steps, 2 * steps) for row in rows_of_step(step=step, **order)]
    assert sorted(first) == sorted(second) == list(range(count))
    placed = [source for _, source in sorted(zip(first, second, strict=True))]
    parts = [rows.row(row) for row in placed]
    return TokenDataset(
        input_ids=np.concatenate([ids for ids, _ in parts]),
        loss_mask=np.concatenate([mask for _, mask in parts]),
        row_offsets=np.cumsum([0, *(len(ids) for ids, _ in parts)]),
    )


def children(base, folder: Path) -> dict[str, Submission]:
    """Return a child of each method, and pairs that are compared with the parent."""
    jobs: dict[str, Submission] = {}
    for index, method in enumerate(METHODS):
        make_parent(base, folder / method, method)
        jobs[method] = child_of(folder / method, seed=60 + 2 * index)
    for method in ("lora", "tokens", "in_full", "dora"):
        pairs = child_of(folder / method, seed=90, objective=DPO)
        jobs[f"dpo_{method}"] = replace(
            pairs, train=dataset(91, [9, 14, 31, 22, 5, 40, 3, 2]), valid=dataset(92, [7, 12])
        )
    kto = child_of(folder / "lora", seed=94, objective=ObjectiveConfig(kind="kto", beta=0.4))
    jobs["kto"] = replace(kto, train=preferences()["kto"].train, valid=None)
    return jobs


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gpt2", "float32")])
def test_packed_equals_solo_for_children(load, tmp_path, family, dtype):
    base = load(family, dtype)
    jobs = children(base, tmp_path)
    jobs["orphan"] = Submission(config=config(rank=4, seed=70), train=dataset(70, [7, 12, 30]))
    jobs["orphan_pairs"] = Submission(config=config(rank=4, seed=71, objective=DPO), train=dataset(71, [7, 12, 30, 5]))
    alone = {name: run_alone(base, job) for name, job in jobs.items()}

    packed = run_elastically(base, jobs, token_budget=300, seed=1, victim="none", num_lanes=2)

    assert {name: packed[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(
    ("family", "dtype", "method", "objective"),
    [
        ("llama", "float32", "dora", ObjectiveConfig()),
        ("llama", "bfloat16", "pissa", ObjectiveConfig()),
        ("gpt2", "bfloat16", "tokens", DPO),
        ("llama", "float32", "lora", DPO),
    ],
)
def test_child_resumed_from_any_tick_ends_with_the_same_bytes(load, tmp_path, family, dtype, method, objective):
    base = load(family, dtype)
    make_parent(base, tmp_path / "parent", method)
    job = child_of(tmp_path / "parent", objective=objective)
    whole = run_alone(base, job)

    engine = Engine(base, EngineConfig(job_tokens=1))
    admit(engine, "job", job)
    before, num_ticks = [], 0
    while not engine.idle:
        engine.save_checkpoint("job", tmp_path / f"{num_ticks}")
        vectors, after = finish_elsewhere(base, tmp_path / f"{num_ticks}", job)

        assert vectors == whole.vectors, f"saved after tick {num_ticks}"
        assert rename(before, "job") + rename(after, "job") == whole.events, f"saved after tick {num_ticks}"
        before += engine.tick()
        num_ticks += 1


def test_checkpoint_resumes_only_with_its_own_parent(load, tmp_path):
    base = load("llama")
    make_parent(base, tmp_path / "parent")
    job = child_of(tmp_path / "parent")
    engine = begun(base, job)
    engine.tick()
    engine.save_checkpoint("job", tmp_path / "saved")
    engine.evict("job")
    trained(base, job).export("job", tmp_path / "other", base_name="tiny")

    for parent in (None, tmp_path / "other"):
        with pytest.raises(BadCheckpoint, match="parent_sha256"):
            admit(engine, "job", replace(job, parent=parent), resume_from=tmp_path / "saved")

    orphan = replace(job, parent=None)
    admit(engine, "orphan", orphan)
    engine.save_checkpoint("orphan", tmp_path / "orphan")
    with pytest.raises(BadCheckpoint, match="parent_sha256"):
        admit(engine, "job", job, resume_from=tmp_path / "orphan")
    assert engine.jobs() == ("orphan",)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("lora", "float32"),
        ("lora", "bfloat16"),
        ("patterns", "float32"),
        ("dora", "bfloat16"),
        ("in_full", "bfloat16"),
        ("tokens", "float32"),
        ("pissa", "bfloat16"),
    ],
)
def test_child_is_served_by_peft_as_trained(load, tmp_path, dtype, method):
    base = load("llama", dtype)
    make_parent(base, tmp_path / "parent", method)
    job = child_of(tmp_path / "parent", num_steps=6, learning_rate=2e-2)
    trained(base, job).export("job", tmp_path / "child", base_name="tiny")

    verdict = verify_export(base, tmp_path / "child")

    assert verdict.passed, verdict
    assert verdict.max_abs_effect > 3 * verdict.tolerance


def test_a_grandchild_continues_a_child(load, tmp_path):
    base = load("gpt2", "bfloat16")
    make_parent(base, tmp_path / "parent", "patterns")
    child = trained(base, child_of(tmp_path / "parent"))
    child.export("job", tmp_path / "child", base_name="tiny")

    assert torch.equal(logits(begun(base, child_of(tmp_path / "child"))), logits(child))


PEFT_FOLDERS = {
    "names": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "pattern": ("llama", {"target_modules": r".*\.1\.mlp\..*_proj", "alpha_pattern": {"up_proj": 3}}),
    "all except one": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "use_rslora": True}),
    "default targets": ("llama", {"rank_pattern": {r"layers\.1\..*": 2}}),
    "dora": ("llama", {"target_modules": ["o_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "tokens": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": [7, 3, 90]}),
    "head": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head"],
            "trainable_token_indices": {"embed_tokens": [5]},
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEFT_FOLDERS)
def test_adapter_saved_by_peft_is_continued(load, base_dirs, tmp_path, name):
    family, fields = PEFT_FOLDERS[name]
    model = AutoModelForCausalLM.from_pretrained(base_dirs[family], dtype=torch.float32)
    adapted = save_by_peft(model, tmp_path / "parent", task_type="CAUSAL_LM", **fields)
    base = load(family)

    child = begun(base, child_of(tmp_path / "parent"))

    ids = torch.from_numpy(pseudo_random_ids(base, "test", 1))
    with torch.no_grad(), adapted.disable_adapter():
        plain = model(input_ids=ids).logits[:, -2:]
    with torch.no_grad():
        theirs = adapted(input_ids=ids).logits[:, -2:]
    assert float((theirs - plain).abs().max()) > 0.05
    torch.testing.assert_close(logits(child), theirs, rtol=1e-4, atol=1e-4)


NARROW = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.filterwarnings("ignore")
def test_half_precision_parent_is_loaded_with_its_exact_values(load, base_dirs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dirs["llama"], dtype=torch.float32)
    adapted = save_by_peft(model, tmp_path / "parent", dtype=torch.float16, **NARROW)

    child = begun(load("llama"), child_of(tmp_path / "parent"))

    path = "model.layers.1.self_attn.q_proj"
    theirs = adapted.get_base_model().get_submodule(path).lora_B.default.weight
    assert theirs.dtype == torch.float16
    assert torch.equal(child._jobs["job"].adapter.sites[path].b_OR, theirs.float())


@pytest.mark.filterwarnings("ignore")
def test_classifier_saved_by_peft_is_continued_with_its_head(base_dirs, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base_dirs["llama"], num_labels=3, pad_token_id=0)
    adapted = save_by_peft(model, tmp_path / "parent", target_modules=["q_proj"], task_type="SEQ_CLS")
    base = load_base(base_dirs["llama"], dtype="float32", device="cpu", task="sequence-classification")
    job = child_of(tmp_path / "parent", objective=ObjectiveConfig(kind="classification", num_labels=3))
    rows = classified(31, [12, 25, 9, 31], num_labels=3)

    child = begun(base, replace(job, train=rows, valid=rows))

    ids = torch.from_numpy(pseudo_random_ids(base, "test", 1)).clamp(min=3)
    with torch.no_grad():
        theirs = adapted(input_ids=ids).logits
    ours = packed_logits(base, child._jobs["job"].adapter, ids.numpy())[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_reward_model_starts_with_language_model_layers_and_a_new_head(load, base_dirs, tmp_path):
    parent = make_parent(load("llama"), tmp_path / "parent")
    base = load_base(base_dirs["llama"], dtype="float32", device="cpu", task="sequence-classification")
    job = replace(
        child_of(tmp_path / "parent", objective=ObjectiveConfig(kind="reward")),
        train=dataset(34, [9, 14, 31, 22]),
        valid=None,
    )

    child, orphan = begun(base, job), begun(base, replace(job, parent=None))

    head = slice(parent.job("job").adapter.num_parameters, None)
    assert torch.equal(weights(child, "job")[: head.start], weights(parent, "job"))
    assert torch.equal(weights(child, "job")[head], weights(orphan, "job")[head])
    assert weights(child, "job")[head].any()


def test_additional_full_modules_of_a_child_start_as_in_the_base(load, tmp_path):
    base = load("llama")
    parent = make_parent(base, tmp_path / "parent")
    job = child_of(tmp_path / "parent")
    more = replace(job.config.lora, modules_to_save=("lm_head",), trainable_token_indices=(4, 2))

    child = begun(base, replace(job, config=replace(job.config, lora=more)))

    assert torch.equal(logits(child), logits(parent))
    assert child.job("job").adapter.num_parameters > parent.job("job").adapter.num_parameters


@pytest.mark.parametrize("method", ["lora", "dora", "in_full", "tokens"])
def test_pairs_are_compared_with_the_parent_not_with_the_base(load, tmp_path, method):
    base = load("llama", "bfloat16")
    make_parent(base, tmp_path / "parent", method)
    pairs = dataset(91, [9, 14, 31, 22])
    job = replace(child_of(tmp_path / "parent", objective=DPO, learning_rate=3e-3), train=pairs, valid=pairs)

    events = run_alone(base, job).events

    first, *_, last = [event for event in events if isinstance(event, JobEvaluated)]
    assert first.step == 0
    assert first.loss == pytest.approx(math.log(2), abs=1e-12)
    assert first.rewards is not None
    assert (first.rewards.chosen, first.rewards.rejected) == (0, 0)
    assert last.loss < first.loss


def test_configuration_of_a_child_is_read_from_the_folder(load, tmp_path):
    make_parent(load("llama"), tmp_path / "plain")
    make_parent(load("llama"), tmp_path / "pissa", "pissa")

    plain, doubled = lora_config_of(tmp_path / "plain"), lora_config_of(str(tmp_path / "pissa"))

    assert (plain.rank, plain.alpha, plain.dropout) == (4, 8, 0)
    assert (doubled.rank, doubled.alpha, doubled.init_lora_weights) == (8, 16, "default")
    assert len(plain.target_modules) == 14
    assert plain == replace(LoraConfig(rank=4, alpha=8), target_modules=plain.target_modules)

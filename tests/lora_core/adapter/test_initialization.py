"""Initialization of adapters: PEFT's gaussian, PiSSA and OLoRA, on a base model that never changes."""

import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.adapter.initialization import decomposed, largest_by_gram
from lora_core.config import LoraConfig, ScheduleConfig
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError, NoTargets
from lora_core.events import JobEvaluated, JobStepped
from lora_core.model_files.merge import merge_adapter
from lora_core.peft_format.verify import verify_export
from tests.lora_core.peft_format.test_peft_parity import JOB, run_reference
from tests.lora_core.scenarios import Submission, admit, config, dataset

STEPS = 20
CALM = replace(
    JOB.config,
    num_steps=STEPS,
    schedule=ScheduleConfig(kind="cosine", warmup_steps=2, num_steps=STEPS),
    optimizer=replace(JOB.config.optimizer, learning_rate=1e-3),
)
TARGET = AdaptedModule(name="w", in_features=40, out_features=48)


def started(init: str, weight_OD: torch.Tensor | None = None, **options) -> FlatAdapter:
    lora = LoraConfig(rank=8, alpha=12, init_lora_weights=init, **options)
    frozen = None if weight_OD is None else {"w": weight_OD}
    adapter = FlatAdapter((TARGET,), lora, dtype=torch.float32, device="cpu", frozen=frozen)
    adapter.initialize(1)
    return adapter


def product(adapter: FlatAdapter) -> torch.Tensor:
    """Return scale·B·A of the flat adapter, without the subtracted initial product."""
    a_RD, b_OR = (
        adapter.p[span].view(shape)
        for span, shape in ((adapter.spans["w"].a, (8, 40)), (adapter.spans["w"].b, (48, 8)))
    )
    return adapter.sites["w"].scale * b_OR @ a_RD


def test_gaussian_has_the_standard_deviation_of_peft_and_no_update():
    adapter = started("gaussian")

    assert float(adapter.p[: adapter.num_a].std()) == pytest.approx(1 / 8, rel=0.15)
    assert abs(float(adapter.p[: adapter.num_a].mean())) < 0.03
    assert not adapter.p[adapter.num_a :].any()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_starts_with_the_best_matrix_of_its_rank(init, use_rslora):
    weight_OD = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(weight_OD, full_matrices=False)

    adapter = started(init, weight_OD, use_rslora=use_rslora)

    torch.testing.assert_close(
        product(adapter), u[:, :8] * s[:8] @ v[:8], rtol=0, atol=2e-2 if "niter" in init else 1e-4
    )
    assert started(init, weight_OD, use_rslora=use_rslora).p.equal(adapter.p)


def test_more_iterations_come_closer_to_the_exact_decomposition():
    weight_OD = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    exact = product(started("pissa", weight_OD))

    errors = [float((product(started(f"pissa_niter_{n}", weight_OD)) - exact).norm()) for n in (1, 4, 16)]

    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 10


def test_olora_starts_with_orthonormal_columns_in_b():
    weight_OD = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    a_RD, b_OR = decomposed(LoraConfig(rank=8, alpha=8, init_lora_weights="olora"), "w", weight_OD, seed=0)

    torch.testing.assert_close(b_OR.T @ b_OR, torch.eye(8))
    torch.testing.assert_close((b_OR @ a_RD)[:, :8], weight_OD[:, :8])


@pytest.mark.parametrize(
    ("family", "init"),
    [("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora")],  # PEFT's OLoRA doesn't support Conv1D
)
def test_losses_equal_peft_which_changes_its_base(load, family, init, tmp_path):
    lora = replace(CALM.lora, init_lora_weights=init)
    engine = Engine(load(family), EngineConfig())
    admit(engine, "job", replace(JOB, config=replace(CALM, lora=lora)))
    losses = []
    while not engine.idle:
        losses += [event.loss for event in engine.tick() if isinstance(event, JobStepped)]
    engine.export("job", tmp_path / "end", base_name="tiny")

    wanted = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        target_modules="all-linear",
        init_lora_weights=init,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(family).model, wanted)
        expected, trained = run_reference(model, CALM)

    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.02
    adapter = engine._jobs["job"].adapter
    for name, spans in adapter.spans.items():
        a_RD = trained[f"base_model.model.{name}.lora_A.weight"]
        b_OR = trained[f"base_model.model.{name}.lora_B.weight"]
        ours = adapter.p[spans.b].view(-1, spans.rank) @ adapter.p[spans.a].view(spans.rank, -1)
        torch.testing.assert_close(ours, b_OR @ a_RD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama", "float32", {"init_lora_weights": "pissa", "rank_pattern": (("q_proj", 2),)}),
        ("gpt2", "float32", {"init_lora_weights": "olora", "use_rslora": True, "alpha_pattern": (("c_attn", 3.0),)}),
        ("llama", "bfloat16", {"init_lora_weights": "pissa_niter_4", "dropout": 0.1}),
        ("llama", "float32", {"init_lora_weights": "olora", "use_dora": True}),
    ],
)
def test_export_is_plain_lora_of_twice_the_rank_on_the_unchanged_base(
    load, base_dirs, tmp_path, family, dtype, options
):
    base = load(family, dtype)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    small = config(num_steps=4, learning_rate=5e-3)
    data = dataset(1, [20, 33, 15])
    engine = Engine(base, EngineConfig())
    job = Submission(config=replace(small, lora=replace(small.lora, **options)), train=data, valid=data)
    admit(engine, "job", job)
    admit(engine, "plain", Submission(config=small, train=data, valid=data))
    first: dict[str, float] = {}
    while not engine.idle:
        for event in engine.tick():
            if isinstance(event, JobEvaluated):
                first.setdefault(event.job, event.loss)
    engine.export("job", tmp_path / "adapter", base_name="tiny")

    verdict = verify_export(base, tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", base_dirs[family], tmp_path / "merged", dtype=dtype)

    assert verdict.passed, verdict
    assert verdict.max_abs_effect > 3 * verdict.tolerance
    assert merged.max_abs_diff <= merged.tolerance
    assert first["job"] == pytest.approx(first["plain"], rel=1e-5 if dtype == "float32" else 2e-3)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    assert all(torch.equal(before[name], weight) for name, weight in base.model.state_dict().items())


def test_too_high_rank_and_unknown_initialization_are_rejected(load):
    job = config(rank=33)
    pissa = replace(job, lora=replace(job.lora, init_lora_weights="pissa"))
    with pytest.raises(NoTargets, match=r"rank 33 for .*k_proj \(32 by 64\)") as caught:
        admit(Engine(load("llama"), EngineConfig()), "job", Submission(config=pissa, train=dataset(1, [9])))
    assert "rank_pattern" in caught.value.remedy
    for name in ("svd", "pissa_niter_", "pissa_niter_0", "pissa_niter_100"):
        with pytest.raises(ConfigError, match="init_lora_weights"):
            LoraConfig(rank=1, alpha=1, init_lora_weights=name)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_largest_singular_values_by_eigenvectors_are_those_of_the_svd(shape):
    weight_OD = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u_OK, s_K, v_KD = torch.linalg.svd(weight_OD.double(), full_matrices=False)

    u_OR, s_R, v_RD = largest_by_gram(weight_OD, 5)

    torch.testing.assert_close(s_R, s_K[:5].float())
    torch.testing.assert_close((u_OR * s_R) @ v_RD, ((u_OK[:, :5] * s_K[:5]) @ v_KD[:5]).float(), atol=1e-5, rtol=1e-5)


def test_largest_singular_values_of_a_weight_with_a_lower_rank_are_finite():
    weight_OD = torch.ones(6, 9)

    u_OR, s_R, v_RD = largest_by_gram(weight_OD, 3)

    torch.testing.assert_close((u_OR * s_R) @ v_RD, weight_OD, atol=1e-5, rtol=1e-5)

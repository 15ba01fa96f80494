"""Adapters on the command line: pulling, verifying and using them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from catalog.audit import lineage_signatures
from catalog.exports import formats
from catalog.serving import servability
from lorry.cli.app import EXIT_NOT_CHECKED
from lorry.cli.commands.adapters import folder_name
from lorry.cli.render import serving
from tests.lorry.adapter_fixture import FILES, lineage, manifest, serve, tar
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
Run = Callable[..., Result]


def test_offline_verification_is_not_ok_and_finds_changed_files(service: Script, run: Run, tmp_path: Path) -> None:
    serve(service, tar())

    pulled = run("adapters", "pull", "a")
    folder = tmp_path / pulled.stdout.strip()
    first = run("adapters", "verify", folder)
    (folder / "adapter_config.json").write_text("x")
    second = run("adapters", "verify", folder, "--json")

    assert folder.name == "ft-m-p-s-..-x-1"
    assert first.exit_code == EXIT_NOT_CHECKED
    assert "all digests match, but the signature was not checked" in first.stderr
    assert "OK" not in first.stderr
    assert second.exit_code == 1
    assert json.loads(second.stdout)["passed"] is False


@pytest.mark.parametrize(
    ("base", "printed"),
    [
        (
            {
                "source": "org/tiny",
                "revision": "abc",
                "local_path": "/nowhere/on/this/machine",
                "description": {"architecture": "Gemma2ForCausalLM"},
            },
            '"org/tiny", revision="abc"',
        ),
        ({"source": "/made/elsewhere", "description": {"architecture": "Gemma2ForCausalLM"}}, "BASE"),
        (Reply(status=404, body={}), "BASE"),
    ],
)
def test_pull_prints_how_to_load_the_folder_with_peft(service: Script, run: Run, base: Any, printed: str) -> None:
    serve(service, tar())
    service.on("GET", "/v1/models/m", base)

    lines = run("adapters", "pull", "a", "mine").stderr.splitlines()

    assert lines[:3] == [
        "Load it with PEFT:",
        f"  base = AutoModelForCausalLM.from_pretrained({printed}, dtype=torch.bfloat16)",
        '  model = PeftModel.from_pretrained(base, "mine")',
    ]
    assert lines[3] == "Serve it with vLLM on a GPU:"
    assert lines[4].startswith("  vllm serve ")
    assert lines[5:] == (["BASE is the folder or Hub ID of m."] if printed == "BASE" else [])


@pytest.mark.parametrize(
    ("base", "is_printed"),
    [
        ({"source": "org/tiny", "description": {"architecture": "Qwen2ForCausalLM"}}, True),
        ({"source": "org/tiny", "description": {"architecture": "GPT2LMHeadModel"}}, False),
        ({"source": "org/tiny", "description": {}}, True),
        (Reply(status=404, body={}), False),
    ],
)
def test_pull_prints_the_export_as_gguf_where_the_service_accepts_it(
    service: Script, run: Run, base: Any, is_printed: bool
) -> None:
    serve(service, tar())
    service.on("GET", "/v1/models/m", base)

    lines = run("adapters", "pull", "a", "my adapter").stderr.splitlines()

    commands = [
        "Run it with llama.cpp or Ollama:",
        "  lorry adapters export ft:m:p:s/../x:1 --format gguf --to 'my adapter-gguf'",
        "  llama-server --model 'my adapter-gguf'/*.gguf --port 8080",
        "  ollama create s/../x --file 'my adapter-gguf/Modelfile'",
        "  ollama run s/../x",
    ]
    assert [line for line in lines[5:] if not line.startswith("BASE")] == (commands if is_printed else [])


def test_architectures_are_those_of_the_service() -> None:
    assert serving.GGUF_ARCHITECTURES == formats.GGUF_ARCHITECTURES
    assert serving.VLLM_WITHOUT_LORA == servability.VLLM_WITHOUT_LORA


def test_pull_prints_no_command_of_vllm_for_a_class_without_adapters(service: Script, run: Run) -> None:
    serve(service, tar())
    service.on("GET", "/v1/models/m", {"source": "org/tiny", "description": {"architecture": "GPT2LMHeadModel"}})

    printed = run("adapters", "pull", "a", "mine").stderr

    assert "vllm serve" not in printed
    assert "--format merged   # vLLM loads no adapters for GPT2LMHeadModel, but the merged model\n" in printed


@pytest.mark.parametrize(
    ("config", "fields", "command"),
    [
        ({"r": 16}, {}, "vllm serve org/tiny --revision abc --enable-lora --max-lora-rank 16 "),
        ({"r": 17}, {}, "vllm serve org/tiny --revision abc --enable-lora --max-lora-rank 32 "),
        ({"r": 1}, {"quantization": "nf4"}, "vllm serve org/tiny --revision abc --quantization bitsandbytes --enable-"),
        ({"r": 513}, {}, "lorry adapters export ft:m:p:s/../x:1 --format merged   # vLLM loads no adapter of a rank"),
        ({"r": 8, "use_dora": True}, {}, "lorry adapters export ft:m:p:s/../x:1 --format merged   # vLLM can't load"),
        ({"r": 8, "rank_pattern": {"q": 4}}, {}, "lorry adapters export ft:m:p:s/../x:1 --format merged   # vLLM can"),
        ({"r": 8}, {"quantization": "int8"}, "lorry adapters export ft:m:p:s/../x:1 --format merged   # vLLM has no"),
    ],
)
def test_pull_prints_a_command_of_vllm_that_can_load_the_adapter(
    service: Script, run: Run, config: dict[str, Any], fields: dict[str, str], command: str
) -> None:
    files = {**FILES, "adapter_config.json": json.dumps(config).encode()}
    serve(service, tar(files), listing=manifest(files), **fields)
    service.on("GET", "/v1/models/m", {"source": "org/tiny", "revision": "abc"})

    lines = run("adapters", "pull", "a", "mine").stderr.splitlines()

    assert lines[4].startswith(f"  {command}"), lines[4]
    if command.startswith("vllm"):
        assert lines[4].endswith(" --lora-modules adapter=mine")


def test_pull_prints_the_local_folder_of_the_base_model(service: Script, run: Run, tmp_path: Path) -> None:
    serve(service, tar())
    service.on("GET", "/v1/models/m", {"source": "org/tiny", "local_path": str(tmp_path)})

    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path}", ' in run("adapters", "pull", "a").stderr
    assert run("adapters", "pull", "a", "--json").stderr == ""


@pytest.mark.parametrize("typed", ["best/", "./best", "~/best"])
def test_pull_of_a_path_is_a_usage_error(service: Script, run: Run, typed: str) -> None:
    result = run("adapters", "pull", typed)

    assert result.exit_code == 2
    assert f"{typed!r} is a path, not an adapter. Use: lorry adapters pull ADAPTER {typed}" in result.stderr
    assert service.seen == []


def test_pull_accepts_the_id_of_a_job(service: Script, run: Run, tmp_path: Path) -> None:
    serve(service, tar())
    service.on("GET", f"{JOBS}/ftjob-1", {"id": "ftjob-1", "status": "succeeded", "fine_tuned_model": "a"})

    assert run("adapters", "pull", "ftjob-1", "mine").stdout == "mine\n"
    assert (tmp_path / "mine" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        ("running", "Wait until the job succeeds, or use one of its checkpoints: `lorry jobs checkpoints ftjob-1`"),
        ("paused", "Resume the job with `lorry jobs resume ftjob-1`"),
        ("failed", "Use one of its checkpoints, if there are any: `lorry jobs checkpoints ftjob-1`"),
    ],
)
def test_pull_of_a_job_without_an_adapter_reports_its_status(
    service: Script, run: Run, status: str, advice: str
) -> None:
    service.on("GET", f"{JOBS}/ftjob-1", {"id": "ftjob-1", "status": status, "fine_tuned_model": None})

    result = run("adapters", "pull", "ftjob-1")

    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first == f"Error: Job ftjob-1 has no final adapter. Its status is {status}."
    assert second.startswith(advice)


def test_pull_of_a_sweep_without_an_adapter_suggests_a_command(service: Script, run: Run) -> None:
    error = {
        "message": "No adapter with the ID 'sweep-1'. See GET /v1/sweeps/{id}.",
        "remedy": "See GET /v1/sweeps/{id}.",
        "code": "adapter_not_found",
    }
    service.on("GET", "/v1/adapters/sweep-1", Reply(status=404, body={"error": error}))

    printed = run("adapters", "pull", "sweep-1").stderr

    assert "lorry sweeps show sweep-1" in printed
    assert "/v1/" not in printed


def test_signature_of_another_service_is_unknown_and_not_a_forgery(service: Script, run: Run, tmp_path: Path) -> None:
    artifact = manifest()["artifact"]
    mine, other = b"m" * 32, b"o" * 32
    printed = lineage(artifact)
    printed["signature"] = lineage_signatures.sign_lineage(
        lineage_id=printed["lineage_id"], artifact=artifact, pepper=other
    )
    service.on("GET", "/v1/adapters/a/lineage", printed)
    serve(service, tar())
    keys = [{"keys": [lineage_signatures.public_key(pepper)]} for pepper in (mine, other)]
    service.on("GET", "/v1/keys.json", *keys)
    folder = tmp_path / run("adapters", "pull", "a").stdout.strip()

    unknown = run("adapters", "verify", folder)
    valid = run("adapters", "verify", folder)

    text = " ".join(unknown.stderr.split())
    assert unknown.exit_code == 1
    assert f"the signature was made with a key that {service.url} does not have" in text
    assert "FAILED" not in text
    assert valid.exit_code == 0
    assert f"a key of {service.url}" in " ".join(valid.stderr.split())


def test_verification_by_the_service_prints_its_problems(service: Script, run: Run) -> None:
    service.on("POST", "/v1/adapters/a/verify", {"passed": False, "problems": ["x is missing."]})

    result = run("adapters", "verify", "a")

    assert result.exit_code == 1
    assert "x is missing." in result.stderr


@pytest.mark.parametrize(("method", "command"), [("POST", "verify"), ("GET", "lineage")])
def test_unknown_adapter_error_mentions_the_missing_folder(
    service: Script, run: Run, method: str, command: str
) -> None:
    error = {"message": "No adapter with the ID 'gone'. Check it.", "remedy": "Check it.", "code": "adapter_not_found"}
    service.on(method, f"/v1/adapters/gone/{command}", Reply(status=404, body={"error": error}))

    assert run("adapters", command, "gone").stderr.splitlines() == [
        "Error: No adapter with the ID 'gone'.",
        "Check it. There is no folder 'gone' here either.",
    ]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("ft:m:p:s:1", "ft-m-p-s-1"), ("../../etc", "etc"), ("/", "adapter"), ("..", "adapter"), ("a b", "a-b")],
)
def test_adapter_name_becomes_a_safe_folder_name(name: str, folder: str) -> None:
    assert folder_name(name) == folder


def test_pull_prints_the_quantization_config_of_the_base_model(service: Script, run: Run) -> None:
    serve(service, tar(), quantization="nf4", precision="float32")
    service.on("GET", "/v1/models/m", {"source": "org/tiny"})

    expected = run("adapters", "pull", "a", "mine").stderr

    (call,) = [line.removeprefix("  base = ") for line in expected.splitlines() if line.startswith("  base = ")]
    assert call == (
        'AutoModelForCausalLM.from_pretrained("org/tiny", dtype=torch.float32, quantization_config=BitsAndBytesConfig('
        'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
        "bnb_4bit_compute_dtype=torch.float32))"
    )


def test_adapter_is_shared_and_unshared(service: Script, run: Run) -> None:
    path = "/v1/fine_tuning/checkpoints/adapter-1/permissions"
    given = {"id": "cp-1", "created_at": 1790000000, "project_id": "proj-2"}
    service.on("POST", path, {"data": [given]})
    service.on("GET", path, {"data": [given], "has_more": False})
    service.on("DELETE", f"{path}/cp-1", {"deleted": True})

    run("adapters", "share", "adapter-1", "search", "proj-3")
    shown = run("adapters", "shares", "adapter-1").stdout
    run("adapters", "unshare", "adapter-1", "cp-1")

    (sent,) = service.requests("POST", path)
    assert json.loads(sent.body) == {"project_ids": ["search", "proj-3"]}
    assert "cp-1" in shown
    assert len(service.requests("DELETE", f"{path}/cp-1")) == 1


REPRODUCTION: dict[str, Any] = {
    "adapter": "adapter-1",
    "name": "ft:m:p:docs:1",
    "expected": {"weights": "a" * 64, "loss_log": "b" * 64},
}


def _serve_reproduction(service: Script, **verdict: Any) -> None:
    service.on("GET", "/v1/adapters/docs", {"id": "adapter-1", "name": "ft:m:p:docs:1"})
    service.on("POST", "/v1/adapters/docs/reproduce", {"id": "ftjob-1", "status": "queued", "reproduces": REPRODUCTION})
    done = {"id": "ftjob-1", "status": "succeeded", "fine_tuned_model": "ft:m:p:reproduced:2"}
    service.on("GET", f"{JOBS}/ftjob-1", done | {"reproduces": {**REPRODUCTION, **verdict}})


def test_reproduce_prints_the_verdict_of_an_identical_adapter(service: Script, run: Run) -> None:
    same = {"identical": True, "reproduced": REPRODUCTION["expected"], "differences": [], "message": "Identical."}
    _serve_reproduction(service, **same)

    result = run("adapters", "reproduce", "docs")

    assert result.exit_code == 0, result.stderr
    assert f"weights: {'a' * 64} recorded, {'a' * 64} now." in result.stderr
    assert "OK: Identical." in result.stderr
    (sent,) = service.requests("POST", "/v1/adapters/docs/reproduce")
    assert sent.headers["idempotency-key"]


def test_reproduce_exits_with_1_and_names_what_differs(service: Script, run: Run) -> None:
    other = {"weights": "c" * 64, "loss_log": "b" * 64}
    torch = {"field": "version of torch", "recorded": "2.9.0", "reproduced": "2.10.0"}
    machines = {"recorded": [{"worker": "w1", "from_step": 0}, {"worker": "w2", "from_step": 50}], "reproduced": []}
    _serve_reproduction(
        service, identical=False, reproduced=other, differences=[torch], machines=machines, message="It differs."
    )

    result = run("adapters", "reproduce", "docs")

    assert result.exit_code == 1
    assert f"weights: {'a' * 64} recorded, {'c' * 64} now." in result.stderr
    assert "workers recorded: w1 (from step 0), w2 (from step 50)." in result.stderr
    assert "version of torch: 2.9.0 recorded, 2.10.0 now." in result.stderr
    assert "FAILED: It differs." in result.stderr


def test_reproduce_as_json_prints_the_job_and_exits_with_1(service: Script, run: Run) -> None:
    _serve_reproduction(service, identical=False, reproduced={}, differences=[], message="It differs.")

    result = run("adapters", "reproduce", "docs", "--json")

    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["reproduces"]["identical"] is False


def test_reproduce_detached_creates_the_job_and_does_not_wait(service: Script, run: Run) -> None:
    _serve_reproduction(service)

    result = run("adapters", "reproduce", "docs", "--detach")

    assert result.exit_code == 0
    assert "lorry jobs show ftjob-1" in result.stderr
    assert service.requests("GET", f"{JOBS}/ftjob-1") == []


def test_reproduce_without_a_comparison_is_an_error(service: Script, run: Run) -> None:
    _serve_reproduction(service)

    result = run("adapters", "reproduce", "docs")

    assert result.exit_code == 1
    assert "returned no comparison" in result.stderr


def _memory(*components: int) -> dict[str, int]:
    names = ("weights", "gradients", "optimizer_state", "activations")
    return dict(zip(names, components, strict=True)) | {"total": sum(components)}


def test_show_compares_the_adapter_with_full_fine_tuning(service: Script, run: Run) -> None:
    efficiency = {
        "parameters": {"trainable": 4_884_480, "base": 134_515_008, "share": 0.0363},
        "size": {"bytes": 9_793_440, "base_bytes": 269_060_552, "share": 0.0364},
        "training_memory": {
            "lora": _memory(279_000_000, 19_500_000, 58_600_000, 900_000_000),
            "full_fine_tuning": _memory(269_000_000, 269_000_000, 1_610_000_000, 900_000_000),
            "share": 0.41,
            "measured": {"base_bytes": 1, "adapter_bytes": 1, "peak_bytes": 1_500_000_000},
        },
        "inference_latency": {"base_seconds": 0.5, "merged_seconds": 0.505, "ratio": 1.01},
    }
    service.on("GET", "/v1/adapters/a", {"id": "adapter-1", "name": "a", "efficiency": efficiency})
    service.on("GET", "/v1/adapters/a/deployments", {"data": []})

    lines = run("adapters", "show", "a").stdout.splitlines()

    shown = {label.strip(): value for label, _, value in (line.partition("  ") for line in map(str.lstrip, lines))}
    assert {label: value.strip() for label, value in shown.items() if label in LABELS} == {
        "share of parameters": "3.6% of the base model's 134,515,008",
        "size of the weights": "9.79 MB, 3.6% of the base model's 269 MB",
        "training memory": "1.26 GB instead of 3.05 GB for full fine-tuning (computed)",
        "weights": "279 MB instead of 269 MB",
        "gradients": "19.5 MB instead of 269 MB",
        "optimizer state": "58.6 MB instead of 1.61 GB",
        "activations": "900 MB instead of 900 MB",
        "peak of the trainer": "1.50 GB (measured, with all its jobs)",
        "latency when merged": "1.01 times the base model's (measured by the last export)",
    }


LABELS = {
    *("share of parameters", "size of the weights", "training memory", "weights", "gradients", "optimizer state"),
    *("activations", "peak of the trainer", "latency when merged"),
}


def test_show_names_the_exports_that_measure_the_latency(service: Script, run: Run) -> None:
    found = {"parameters": {}, "size": {}, "training_memory": None, "inference_latency": None}
    service.on("GET", "/v1/adapters/a", {"id": "adapter-1", "name": "a", "efficiency": found})
    service.on("GET", "/v1/adapters/a/deployments", {"data": []})

    assert "not measured: the export formats merged and gguf measure it" in run("adapters", "show", "a").stdout


def test_show_omits_a_comparison_that_the_service_does_not_have(service: Script, run: Run) -> None:
    service.on("GET", "/v1/adapters/a", {"id": "adapter-1", "name": "a", "num_parameters": 7, "efficiency": None})
    service.on("GET", "/v1/adapters/a/deployments", {"data": []})

    lines = run("adapters", "show", "a").stdout

    assert "parameters" in lines
    assert "share of" not in lines
    assert "training memory" not in lines

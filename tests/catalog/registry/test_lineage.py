"""Lineage records: their content, what they never contain, and the detection of changes."""

import copy
import json
import math
from hashlib import sha256
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from catalog.registry import lineage
from catalog.registry.lineage import AttemptRecord, DataSource
from catalog.storage.manifest import Manifest, ManifestFile
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow, File

CANARY = "canary-7c1f"
"""Planted wherever a secret, a data row or a host path could leak into the record."""


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def manifest(weights: str = "weights") -> Manifest:
    contents = {"adapter_config.json": "{}", "adapter_model.safetensors": weights}
    files = [ManifestFile(path=path, digest=digest(text), num_bytes=len(text)) for path, text in contents.items()]
    return Manifest.of("adapter", files)


def base(**given: Any) -> BaseModelRow:
    files = [
        {"path": path, "digest": digest(path), "num_bytes": 7}
        for path in ("chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json")
    ]
    content: dict[str, Any] = {
        "name": "smol",
        "kind": "hub",
        "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": "12fd25f",
        "digest": sha256(rfc8785.dumps(files)).hexdigest(),  # type: ignore[arg-type]
        "manifest": {"files": files, "source": f"/home/{CANARY}/x", "revision": None},
        "description": {"num_parameters": 134_515_008, "dtype": "bfloat16", "license": "apache-2.0"},
    }
    return BaseModelRow(**{**content, **given})


def job() -> Job:
    return Job(
        id="ftjob-1",
        project_id="proj-1",
        created_by="key-1",
        created_at=1_700_000_000.25,
        started_at=1_700_000_010.0,
        finished_at=None,
        requested={
            "model": "smol",
            "seed": 7,
            "metadata": {"note": CANARY},
            "integrations": [CANARY],
            "lora": {"rank": "auto"},
        },
        spec={"seed": 7, "lora": {"rank": 16, "alpha": 32.0}, "optimizer": {"learning_rate": 2e-4}},
        error={"message": CANARY},
        progress={"note": CANARY},
    )


def data() -> list[DataSource]:
    report = {"rows": 3, "usable_rows": 2, "tokens": 40, "path": f"/tmp/{CANARY}/file.jsonl", "sample": None}
    file = File(id="file-1", filename=f"{CANARY}.jsonl", digest=digest("data"), num_bytes=99, num_rows=3)
    return [DataSource(role="training", file=file, tokens=digest("tokens"), report=report)]


def attempts() -> list[AttemptRecord]:
    lost = Attempt(
        claim_id="claim-1",
        job_id="ftjob-1",
        number=1,
        worker_id="w1",
        trainer_id="t1",
        started_at=1_700_000_010.0,
        ended_at=1_700_000_020.0,
        reason="infra_lost",
        detail=f"log: {CANARY}",
        resumed_from_step=None,
    )
    last = Attempt(
        claim_id="claim-2",
        job_id="ftjob-1",
        number=2,
        worker_id="w2",
        trainer_id="t2",
        started_at=1_700_000_030.0,
        ended_at=None,
        reason=None,
        detail=None,
        resumed_from_step=50,
    )
    machine = {"device": "cpu", "dtype": "bfloat16", "invariance": "bitwise", "log": f"see '/var/{CANARY}/log.txt'"}
    return [
        AttemptRecord(attempt=lost, trainer=machine, packmates=["ftjob-9", "ftjob-3"]),
        AttemptRecord(attempt=last, trainer=machine),
    ]


def record(**given: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "job": job(),
        "base": base(),
        "adapter": manifest(),
        "num_parameters": 4_884_480,
        "data": data(),
        "attempts": attempts(),
        "results": {"steps": 100, "trained_tokens": 4_000, "evaluation": {"base_loss": 3.5, "loss": 2.25}},
        "code": {"lorry": "0.1.0", "torch": "2.9.0"},
        "finished_at": 1_700_000_100.0,
    }
    return lineage.build(**{**content, **given})


def test_record_describes_the_origin_of_the_adapter() -> None:
    made = record()

    assert made["outputs"]["artifact"] == manifest().digest
    assert made["base"]["revision"] == "12fd25f"
    assert made["base"]["license"] == "apache-2.0"
    assert made["base"]["description"] == {"num_parameters": 134_515_008, "dtype": "bfloat16"}
    assert made["base"]["tokenizer"] == digest("tokenizer.json")
    assert made["base"]["chat_template"] == digest("chat_template.jinja")
    assert made["data"][0]["digest"] == digest("data")
    assert made["data"][0]["preparation"]["usable_rows"] == 2
    assert made["config"]["requested"] == {"model": "smol", "seed": 7, "lora": {"rank": "auto"}}
    assert made["config"]["resolved"]["lora"] == {"rank": 16, "alpha": 32.0}
    assert [(a["number"], a["end"], a["ended_at"], a["resumed_from_step"]) for a in made["attempts"]] == [
        (1, "infra_lost", "2023-11-14T22:13:40.000Z", None),
        (2, "completed", "2023-11-14T22:15:00.000Z", 50),
    ]
    assert [attempt["num_packmates"] for attempt in made["attempts"]] == [2, 0]
    assert made["attempts"][1]["machine"]["invariance"] == "bitwise"
    assert made["people"]["requested_at"] == "2023-11-14T22:13:20.250Z"
    assert made["people"]["finished_at"] == "2023-11-14T22:15:00.000Z"


def test_record_contains_no_secret_row_or_host_path() -> None:
    assert CANARY not in json.dumps(record())


def test_record_omits_project_data_but_keeps_the_configuration() -> None:
    requested = job()
    samples = {"prompts": [CANARY], "max_tokens": 8}
    requested.requested = {**requested.requested, "evaluation": {"every_steps": 5, "samples": samples}}
    requested.spec = {**requested.spec, "evaluation": {"every_steps": 5, "samples": samples}}

    made = record(job=requested)

    content = json.dumps(made)
    assert [name for name in (CANARY, "ftjob-3", "ftjob-9", "key-1") if name in content] == []
    assert made["config"]["requested"]["evaluation"] == {"every_steps": 5}
    assert made["config"]["resolved"]["evaluation"]["every_steps"] == 5


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_location_of_a_local_base_is_omitted(kind: str) -> None:
    made = record(base=base(kind=kind, source="models/of/anna/smol"))

    assert made["base"]["source"] is None
    assert made["base"]["digest"] == base().digest


HOST_PATHS = [
    "/home/anna/x",
    "see /tmp/a/b",
    "file:///srv/x",
    "C:\\data",
    "\\\\host\\share",
    "~/models/x",
    "path=/srv/x/y",
]
NO_HOST_PATHS = ["HuggingFaceTB/SmolLM2", "and/or", "1/2", "https://huggingface.co/a/b", "a: b", "ft:base:proj::x"]


@pytest.mark.parametrize("text", HOST_PATHS)
def test_text_with_a_host_path_is_dropped(text: str) -> None:
    made = record(results={"note": text, "notes": [text, 1], text: 1, "steps": 2})

    assert made["results"] == {"notes": [1], "steps": 2}


@pytest.mark.parametrize("text", NO_HOST_PATHS)
def test_text_without_a_host_path_is_kept(text: str) -> None:
    assert record(results={"note": text})["results"] == {"note": text}


def test_lineage_id_is_the_digest_of_the_canonical_form() -> None:
    made = record()

    assert lineage.canonical(made) == rfc8785.dumps(made)
    assert lineage.lineage_id(made) == sha256(rfc8785.dumps(made)).hexdigest()
    assert lineage.lineage_id(made) == lineage.lineage_id(record())


def test_record_survives_json_and_canonical_round_trips() -> None:
    made = record()

    assert lineage.lineage_id(json.loads(json.dumps(made))) == lineage.lineage_id(made)
    assert lineage.lineage_id(json.loads(lineage.canonical(made))) == lineage.lineage_id(made)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (math.nan, "record.results.loss is nan"),
        (math.inf, "record.results.loss is inf"),
        (2**53, "record.results.loss is 9007199254740992, beyond"),
        ([{"a": b"x"}], r"record.results.loss\[0\].a is of the type bytes"),
        ({1: 2}, "record.results.loss has the key 1"),
    ],
)
def test_values_without_a_canonical_form_are_rejected_with_their_path(value: Any, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        record(results={"loss": value})


def test_intact_record_verifies() -> None:
    made = record()

    assert lineage.verify(made, lineage.lineage_id(made), manifest()) == []


def test_changed_weights_are_reported() -> None:
    made = record()

    problems = lineage.verify(made, lineage.lineage_id(made), manifest("other weights"))

    assert problems == [
        "The file adapter_model.safetensors differs from the record: its digest is "
        f"{digest('other weights')}, not {digest('weights')}.",
        f"The record belongs to the artifact {manifest().digest}, not to {manifest('other weights').digest}.",
    ]


def test_missing_and_extra_files_are_reported() -> None:
    made = record()
    extra = ManifestFile(path="extra.bin", digest=digest("x"), num_bytes=1)
    other = Manifest.of("adapter", [manifest().files[0], extra])

    problems = lineage.verify(made, lineage.lineage_id(made), other)

    assert problems[:2] == [
        "The file adapter_model.safetensors of the record is missing.",
        "The file extra.bin is not in the record.",
    ]


def test_changed_base_is_detected_even_with_a_new_id() -> None:
    made = record()
    made["base"]["files"][2]["digest"] = digest("another model")

    problems = lineage.verify(made, lineage.lineage_id(made), manifest())

    assert problems == ["The base model's digest does not match its files in the record."]


def every_place(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [place for key, item in items for place in every_place(item, (*path, key))]
    return below if below else [path]


@given(st.data())
def test_any_change_is_detected(draw: st.DataObject) -> None:
    made = record()
    changed = copy.deepcopy(made)
    *way, last = draw.draw(st.sampled_from(every_place(made)))
    parent: Any = changed
    for key in way:
        parent = parent[key]
    parent[last] = f"{parent[last]}!"

    assert lineage.verify(changed, lineage.lineage_id(made), manifest())


@pytest.mark.parametrize("broken", [{}, {"format": "lorry.lineage/9"}, {"format": lineage.FORMAT, "outputs": 3}])
def test_malformed_records_are_reported_without_a_crash(broken: dict[str, Any]) -> None:
    assert len(lineage.verify(broken, "0" * 64, manifest())) >= 2

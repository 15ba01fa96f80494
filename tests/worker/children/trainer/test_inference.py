"""A trainer answers requests with its base model and with adapters, and reports text, log-probabilities and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from catalog.datasets.chat import Chat
from lora_core.base_model.model import load_base
from lora_core.distributed.ranks import Ranks
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import BrokenPass, LoraCoreError, OutOfMemory
from lora_core.forward import continuous_batch
from tests import tiny_base
from tests.worker.inference_requests import WorkerEnd
from tests.worker.pack_site import events_in
from tests.worker.trainer_settings import trainer_settings
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.trainer import main
from worker.children.trainer.inference import InferenceRequests, TimeShare
from worker.children.trainer.text_stream import TextStream
from worker.protocol.mailbox import AnswerBody, EventWriter, Json, TrainerDirectory

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
QUESTION = [{"role": "user", "content": "What color is the lorry?"}]
TOOL = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT has written, with random weights."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_dir),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def directory(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> TrainerDirectory:
    made = TrainerDirectory.create(tmp_path / "trainer", trainer_settings(base_dir))
    shutil.copytree(adapter_dir, made.path / "adapters" / "one")
    return made


@pytest.fixture
def make_requests(base_dir: Path, directory: TrainerDirectory) -> Iterator[Callable[..., InferenceRequests]]:
    events = EventWriter(directory)

    def make(base: Path = base_dir, **config: Any) -> InferenceRequests:
        engine = Engine(load_base(base, dtype="float32", device="cpu"), EngineConfig(**config))
        text = BaseText(base)
        return InferenceRequests(engine, directory, events.write, text=lambda: text, free_host_bytes=lambda: 2**26)

    yield make
    events.close()


def body(request_id: str = "req-1", *, adapter: bool = False, **fields: Any) -> AnswerBody:
    """Return a greedy request of one answer of up to 12 tokens."""
    given: dict[str, Any] = {
        "request_id": request_id,
        "model": "tiny",
        "adapter": {"digest": "one", "folder": "adapters/one"} if adapter else None,
        "max_tokens": 12,
        "n": 1,
        "stop": [],
        "seed": 0,
        "temperature": 0.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "num_logprobs": None,
    }
    if "prompts" not in fields:
        given["messages"] = QUESTION
    return given | fields  # pyright: ignore[reportReturnType]


def drained(requests: InferenceRequests, directory: TrainerDirectory) -> list[Json]:
    while not requests.is_idle:
        requests.advance()
    return events_in(directory)


def text_of(events: list[Json], request_id: str = "req-1", index: int = 0) -> str:
    return "".join(delta["text"] for delta in deltas_of(events, request_id) if delta["index"] == index)


def deltas_of(events: list[Json], request_id: str) -> list[Json]:
    generated = [event for event in events if event["type"] == "generated" and event["request_id"] == request_id]
    return [delta for event in generated for delta in event["deltas"]]


def logprobs_of(events: list[Json], request_id: str = "req-1") -> list[Json]:
    return [token for delta in deltas_of(events, request_id) for token in delta.get("logprobs", ())]


def reference(base_dir: Path, adapter: Path | None, messages: list[dict[str, str]]) -> str:
    """Return the answer of transformers, with PEFT for the adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_dir)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    whole = model.generate(**ids, do_sample=False, max_new_tokens=12, eos_token_id=end, pad_token_id=0)
    return str(tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_adapter", [False, True])
def test_chat_answer_is_that_of_transformers_and_peft(
    make_requests: Any, directory: TrainerDirectory, base_dir: Path, adapter_dir: Path, with_adapter: bool
) -> None:
    requests = make_requests()
    requests.add(body(adapter=with_adapter))

    events = drained(requests, directory)

    assert text_of(events) == reference(base_dir, adapter_dir if with_adapter else None, QUESTION)
    assert events[0]["type"] == "answering"
    assert events[-1]["type"] == "answered"
    assert events[-1]["completion_tokens"] <= 12


@pytest.mark.filterwarnings("ignore")
def test_second_end_token_of_the_generation_config_ends_an_answer_as_in_transformers(
    make_requests: Any, directory: TrainerDirectory, base_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = prompt["input_ids"].shape[1]

    def answer_of(folder: Path) -> list[int]:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        return model.generate(**prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, start:].tolist()

    unlimited = answer_of(base_dir)
    second = next(ident for ident in unlimited[3:] if ident not in unlimited[:3])
    base = tmp_path / "two-ends"
    shutil.copytree(base_dir, base)
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, second]}))
    expected = answer_of(base)
    requests = make_requests(base)
    requests.add(body())

    events = drained(requests, directory)

    assert expected[-1] == second
    assert len(expected) < len(unlimited)
    assert text_of(events) == tokenizer.decode(expected[:-1], skip_special_tokens=True)
    assert events[-1]["completion_tokens"] == len(expected)
    assert deltas_of(events, "req-1")[-1]["finish"] == "stop"


def test_end_tokens_that_end_the_answers_are_reported_for_other_engines(
    make_requests: Any, directory: TrainerDirectory, base_dir: Path, tmp_path: Path
) -> None:
    requests = make_requests(tiny_base.without_end_of_turn(base_dir, tmp_path / "base"))
    requests.add(body("chat"))
    requests.add(body("text", prompts=["A lorry"]))
    used = {answer.prompt.name: sorted(answer.prompt.end_ids) for answer in requests._batch._waiting}

    events = drained(requests, directory)

    begun = {event["request_id"]: event["generation"] for event in events if event["type"] == "answering"}
    assert begun["chat"] == {"text": {"end_ids": [0]}, "chat": {"end_ids": [0, 2], "template_kwargs": {}}}
    assert begun["text"] == {"text": {"end_ids": [0]}}
    assert used == {"chat/0": [0, 2], "text/0": [0]}


DATE = "{% if not date_string is defined %}{% set date_string = strftime_now('FORMAT') %}{% endif %}{{ date_string }}"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (DATE.replace("FORMAT", "%d %b %Y"), {"date_string": "26 Jul 2024"}),
        (DATE.replace("FORMAT", "%Y-%m-%d"), {}),
        ("{{ strftime_now('%d %B %Y') }}", {}),
        ("{% set date_string = '1 Jan 2020' %}{{ date_string }}", {}),
    ],
)
def test_variables_that_fix_the_date_of_a_template_are_reported_for_other_engines(
    make_requests: Any,
    directory: TrainerDirectory,
    base_dir: Path,
    tmp_path: Path,
    start: str,
    expected: dict[str, str],
) -> None:
    base = tiny_base.without_end_of_turn(base_dir, tmp_path / "base", template=start + tiny_base.CHAT_TEMPLATE)
    requests = make_requests(base)
    requests.add(body(max_tokens=1))

    begun, *_ = drained(requests, directory)

    assert begun["generation"]["chat"]["template_kwargs"] == expected
    if expected:  # transformers has a clock, and renders the same prompt with them
        tokenizer = AutoTokenizer.from_pretrained(base)
        ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True, **expected)
        assert tuple(ids["input_ids"]) == BaseText(base).chat_ids(Chat(QUESTION))  # pyright: ignore[reportArgumentType]


def test_adapter_changes_the_answer_and_requests_do_not_mix(make_requests: Any, directory: TrainerDirectory) -> None:
    requests = make_requests()
    requests.add(body("base"))
    requests.add(body("adapted", adapter=True))
    requests.add(body("sampled", adapter=True, temperature=1.0, seed=5, n=2))
    together = drained(requests, directory)

    for name, fields in (("base", {}), ("adapted", {"adapter": True})):
        before = len(events_in(directory))
        requests.add(body(name, **fields))
        assert text_of(drained(requests, directory)[before:], name) == text_of(together, name)
    assert text_of(together, "base") != text_of(together, "adapted")
    assert text_of(together, "sampled", 0) != text_of(together, "sampled", 1)


def test_plain_prompts_have_an_answer_each(make_requests: Any, directory: TrainerDirectory, base_dir: Path) -> None:
    requests = make_requests()
    requests.add(body(prompts=["The lorry", "A bridge"], n=2, temperature=0.7, max_tokens=5))

    events = drained(requests, directory)

    text = BaseText(base_dir)
    num_tokens = sum(len(text.prompt_ids(prompt, as_chat=False)) for prompt in ("The lorry", "A bridge"))
    assert events[0]["prompt_tokens"] == num_tokens
    assert {delta["index"] for event in events[1:-1] for delta in event["deltas"]} == {0, 1, 2, 3}
    finishes = [delta["finish"] for event in events[1:-1] for delta in event["deltas"] if "finish" in delta]
    assert len(finishes) == 4
    assert events[-1]["completion_tokens"] <= 20


def test_stop_sequence_ends_an_answer_before_it(make_requests: Any, directory: TrainerDirectory) -> None:
    requests = make_requests()
    requests.add(body("whole", temperature=1.0, seed=3, max_tokens=40))
    whole = text_of(drained(requests, directory), "whole")
    stop = whole[6:9]
    assert len(stop) == 3

    requests.add(body("stopped", temperature=1.0, seed=3, max_tokens=40, stop=["never there", stop]))
    events = drained(requests, directory)

    assert text_of(events, "stopped") == whole[: whole.index(stop)]
    (finish,) = [
        delta["finish"]
        for event in events
        if event["type"] == "generated" and event["request_id"] == "stopped"
        for delta in event["deltas"]
        if "finish" in delta
    ]
    assert finish == "stop"


def test_each_token_has_its_log_probability_and_the_most_likely_ones(
    make_requests: Any, directory: TrainerDirectory
) -> None:
    requests = make_requests()
    requests.add(body(num_logprobs=2, max_tokens=4))

    events = drained(requests, directory)

    tokens = logprobs_of(events)
    assert "".join(token["token"] for token in tokens) == text_of(events)
    for token in tokens:
        assert token["logprob"] < 0
        assert token["bytes"] == list(token["token"].encode())
        assert len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["token"] == token["token"], "greedy: the token is the most likely one"


def test_tokens_of_a_stop_sequence_have_no_log_probabilities(make_requests: Any, directory: TrainerDirectory) -> None:
    requests = make_requests()
    requests.add(body("whole", num_logprobs=0))
    whole = [token["token"] for token in logprobs_of(drained(requests, directory), "whole")]
    stops = {
        "two tokens": whole[4] + whole[5],
        "the end of a token and the next one": whole[4][-1] + whole[5],
        "the first token": whole[0],
    }

    for name, stop in stops.items():
        requests.add(body(name, num_logprobs=0, stop=[stop]))
    events = drained(requests, directory)

    for name, stop in stops.items():
        text, tokens = text_of(events, name), [token["token"] for token in logprobs_of(events, name)]
        assert text == "".join(whole).partition(stop)[0]
        assert "".join(tokens).startswith(text)
        assert len("".join(tokens[:-1])) < len(text) or not tokens, "each token begins in the answer"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"max_tokens": 10_000}, "context_length_exceeded"),
        ({"prompts": ["word " * 500], "max_tokens": None}, "context_length_exceeded"),
        ({"prompts": [""]}, "invalid_config"),
        ({"tools": [TOOL]}, "template_without_tools"),
        ({"adapter": True, "folder": "adapters/gone"}, "bad_parent"),
        ({"temperature": 3.0}, "invalid_config"),
    ],
)
def test_request_that_can_not_be_answered_is_reported(
    make_requests: Any, directory: TrainerDirectory, fields: dict[str, Any], code: str
) -> None:
    requests = make_requests()
    given = body(**{key: value for key, value in fields.items() if key != "folder"})
    if "folder" in fields:
        given["adapter"] = {"digest": "gone", "folder": fields["folder"]}

    requests.add(given)

    (event,) = events_in(directory)
    assert event["type"] == "unanswered"
    assert event["error"]["code"] == code
    assert event["error"]["remedy"]
    assert requests.is_idle


def test_sharded_base_model_rejects_what_exceeds_one_pass(make_requests: Any, directory: TrainerDirectory) -> None:
    """A shortage of memory in a pass of a sharded base model ends the trainer."""
    requests = make_requests(token_budget=40)
    requests._engine.base.strategy = "fsdp2"

    requests.add(body("long", prompts=["word " * 50], max_tokens=None))
    requests.add(body("wide", prompts=["word"], max_tokens=60))
    assert requests.is_idle
    requests.add(body("short", prompts=["word"], max_tokens=None, temperature=1.5))
    events = drained(requests, directory)

    errors = {event["request_id"]: event["error"] for event in events if event["type"] == "unanswered"}
    assert {request_id: error["code"] for request_id, error in errors.items()} == {
        "long": "context_length_exceeded",
        "wide": "context_length_exceeded",
    }
    assert "at most 40 tokens for prompt and answer together, because it is sharded" in errors["long"]["message"]
    (begun,) = [event for event in events if event["type"] == "answering"]
    assert begun["prompt_tokens"] + events[-1]["completion_tokens"] <= 40


def test_shortage_of_another_rank_frees_the_kept_adapters_of_this_one_too(
    make_requests: Any, directory: TrainerDirectory, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that keep different adapters load different ones later, and then wait for each other."""
    shutil.copytree(adapter_dir, directory.path / "adapters" / "two")
    requests = make_requests()
    requests._engine.base.strategy = "fsdp2"
    requests.add(body("first", adapter=True, max_tokens=1))
    requests.add(body("base"))
    requests.advance()
    assert list(requests._adapters) == ["one", ""]
    shortages = [LoraCoreError("The other rank.", remedy="None.", code="out_of_memory")]

    @contextmanager
    def sharing_errors(_: Ranks) -> Iterator[None]:
        yield
        if shortages:
            raise shortages.pop()

    monkeypatch.setattr(Ranks, "sharing_errors", sharing_errors)
    requests.add(body("second") | {"adapter": {"digest": "two", "folder": "adapters/two"}})

    assert list(requests._adapters) == ["", "two"]
    events = drained(requests, directory)
    assert {event["request_id"] for event in events if event["type"] == "answered"} == {"first", "base", "second"}


@pytest.mark.parametrize(("share", "kept"), [(1.0, ["", "one", "two", "three"]), (1e-9, ["", "one", "three"])])
def test_adapters_that_no_request_uses_are_kept_within_a_share_of_the_memory(
    make_requests: Any,
    directory: TrainerDirectory,
    adapter_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    kept: list[str],
) -> None:
    monkeypatch.setattr("worker.children.trainer.inference.ADAPTER_SHARE", share)
    requests = make_requests()
    requests.add(body("base"))
    requests.add(body("long", adapter=True))
    for name in ("two", "three"):
        shutil.copytree(adapter_dir, directory.path / "adapters" / name)
        requests.add(body(name, max_tokens=1) | {"adapter": {"digest": name, "folder": f"adapters/{name}"}})
        requests.advance()

    assert list(requests._adapters) == kept

    drained(requests, directory)
    assert not requests._adapters, "nothing is kept while there is no request"


def test_broken_pass_before_the_first_answer_ends_the_trainer(
    make_requests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests()

    def broken(_: Engine, **__: int) -> None:
        raise BrokenPass

    monkeypatch.setattr(Engine, "continuous_batch", broken)

    with pytest.raises(BrokenPass):
        requests.add(body())


def test_shortage_of_memory_is_reported_in_terms_of_the_request(
    make_requests: Any, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, original = make_requests(), continuous_batch.hidden_states
    requests.add(body("wide", n=2))
    requests.add(body("short", prompts=["word"]))

    def starved(base: Any, pack: Any) -> Any:
        if max(pack.sequence_lengths) > 20:
            raise torch.OutOfMemoryError("no memory")
        return original(base, pack)

    def full(_: Engine, folder: Path) -> None:
        raise OutOfMemory(folder.name)

    monkeypatch.setattr(continuous_batch, "hidden_states", starved)
    monkeypatch.setattr(Engine, "load_adapter", full)
    requests.add(body("adapted", adapter=True))
    events = drained(requests, directory)

    assert {event["request_id"]: event["error"] for event in events if event["type"] == "unanswered"} == {
        "adapted": {
            "code": "out_of_memory",
            "message": "The adapter does not fit in the free memory of the worker.",
            "remedy": "Retry when the worker trains fewer jobs.",
        },
        "wide": {
            "code": "out_of_memory",
            "message": "The prompt with its answer does not fit in the free memory of the worker.",
            "remedy": "Shorten the prompt, or lower max_tokens or n.",
        },
    }
    assert [event["request_id"] for event in events if event["type"] == "answered"] == ["short"]


def test_answer_without_a_limit_may_fill_the_context(make_requests: Any, directory: TrainerDirectory) -> None:
    requests = make_requests()
    requests.add(body(max_tokens=None, temperature=1.5, seed=1))

    events = drained(requests, directory)

    total = events[0]["prompt_tokens"] + events[-1]["completion_tokens"]
    assert total <= tiny_base.MAX_POSITIONS
    assert events[-1]["completion_tokens"] > 12


def test_removed_request_reports_nothing_more(make_requests: Any, directory: TrainerDirectory) -> None:
    requests = make_requests()
    requests.add(body("gone", n=3))
    requests.add(body("kept"))
    requests.advance()
    before = len(events_in(directory))

    requests.remove("gone")
    requests.remove("unknown")
    events = drained(requests, directory)[before:]

    assert {event["request_id"] for event in events} == {"kept"}


def test_request_under_another_claim_is_answered_from_the_beginning(
    make_requests: Any, directory: TrainerDirectory
) -> None:
    requests = make_requests()
    requests.add(body("earlier"))
    requests.advance()
    before = len(events_in(directory))

    requests.add(body("later"))
    requests.remove("earlier")
    events = drained(requests, directory)[before:]

    assert [event["type"] for event in events if event["type"] != "generated"] == ["answering", "answered"]
    requests.add(body("other"))
    assert text_of(events, "later") == text_of(drained(requests, directory), "other")


def test_many_held_log_probabilities_are_divided_among_events(
    make_requests: Any, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of a possible stop sequence is held with its log-probabilities. One line of them could be too long."""
    monkeypatch.setattr("worker.children.trainer.inference.EVENT_LOGPROBS", 5)
    requests = make_requests()
    requests.add(body("whole", num_logprobs=3))
    whole = drained(requests, directory)
    held = text_of(whole, "whole") + " never there"

    requests.add(body("held", num_logprobs=3, n=2, stop=[held]))
    events = drained(requests, directory)

    of_events = [event for event in events if event["type"] == "generated" and event["request_id"] == "held"]
    counts = [sum(len(delta.get("logprobs", ())) for delta in event["deltas"]) for event in of_events]
    assert max(counts) <= 5
    assert sum(counts) == 2 * 12
    for index in (0, 1):
        own = [delta for delta in deltas_of(events, "held") if delta["index"] == index]
        assert [token for delta in own for token in delta.get("logprobs", ())] == logprobs_of(whole, "whole")
        assert text_of(events, "held", index) == text_of(whole, "whole")
        assert [delta.get("finish") for delta in own] == [None] * (len(own) - 1) + ["length"]


def test_ruined_adapter_fails_only_its_own_request(
    make_requests: Any, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests()
    requests.add(body("good"))
    requests.add(body("bad", adapter=True))
    ruined = requests._adapters["one"]
    ruined.p.fill_(float("nan"))
    ruined.refresh_compute()

    events = drained(requests, directory)

    failures = [event for event in events if event["type"] == "unanswered"]
    assert [(event["request_id"], event["error"]["code"]) for event in failures] == [("bad", "inference_failed")]
    assert text_of(events, "good")


def test_trainer_answers_messages_and_then_unloads(directory: TrainerDirectory) -> None:
    worker = WorkerEnd(directory)
    worker.send("answer", **body())
    worker.send("answer", **body("gone"))
    worker.send("stop_answering", request_id="gone")
    settings = directory.settings()
    directory.settings_path.write_text(json.dumps({**settings, "idle_seconds": 0.0}))

    main.run(directory)

    answers = worker.events()
    assert {event["request_id"] for event in answers} == {"req-1"}
    types = [event["type"] for event in answers]
    assert (types[0], set(types[1:-1]), types[-1]) == ("answering", {"generated"}, "answered")
    assert [event["type"] for event in events_in(directory)] == ["ready", "idle", "unloaded"]


def test_time_is_shared_equally_while_both_have_work() -> None:
    share, spent = TimeShare(), {"training": 0.0, "inference": 0.0}
    for _ in range(1000):
        kind, seconds = ("training", 0.7) if share.is_training_next() else ("inference", 0.04)
        share.spent(**{kind: seconds})
        spent[kind] += seconds

    assert spent["training"] == pytest.approx(spent["inference"], rel=0.1)


def test_training_that_was_alone_for_long_owes_inference_one_turn_only() -> None:
    share = TimeShare()
    for _ in range(100):
        share.spent(training=1.0)

    share.spent(inference=1.0)

    assert share.is_training_next()


def test_stream_of_an_answer_begins_after_its_prompt() -> None:
    assert TextStream(lambda ids: "x" * len(ids), prompt=(1, 2)).push(3) == "x"

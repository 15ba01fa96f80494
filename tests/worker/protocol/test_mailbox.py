"""The mailbox between worker and trainer: complete messages in order, and events line by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.protocol import mailbox
from worker.protocol.mailbox import EventReader, EventWriter, InboxReader, InboxWriter, MalformedEvent, TrainerDirectory


@pytest.fixture
def directory(tmp_path: Path) -> TrainerDirectory:
    return TrainerDirectory.create(tmp_path / "trainer", {"device": "cpu"})


def test_messages_are_taken_once_and_in_the_order_they_were_sent(directory: TrainerDirectory) -> None:
    writer, reader = InboxWriter(directory), InboxReader(directory)
    for number in range(12):
        writer.send("cancel", claim_id=f"claim-{number}")

    taken = reader.take()

    assert [message.body["claim_id"] for message in taken] == [f"claim-{number}" for number in range(12)]
    assert {message.verb for message in taken} == {"cancel"}
    assert reader.take() == []


def test_an_incomplete_message_is_not_read(directory: TrainerDirectory) -> None:
    (directory.inbox / ".0001-admit.json.77.tmp").write_text('{"claim_id": ')

    assert InboxReader(directory).take() == []


def test_events_are_read_once_and_a_partial_line_waits_for_the_rest(directory: TrainerDirectory) -> None:
    reader, writer = EventReader(directory), EventWriter(directory)
    assert reader.read() == []

    writer.write({"type": "ready"}, {"type": "idle"})
    writer.close()
    with directory.events_path.open("a") as file:
        file.write('{"type": "unlo')
    first = reader.read()
    with directory.events_path.open("a") as file:
        file.write('aded", "seconds": 1}\n')
    second = reader.read()

    assert [event["type"] for event in first] == ["ready", "idle"]
    assert [event["type"] for event in second] == ["unloaded"]
    assert reader.read() == []


def test_the_log_tail_is_bounded(directory: TrainerDirectory) -> None:
    assert directory.log_tail() == ""
    directory.log_path.write_text("x" * 10_000 + "the end")

    assert directory.log_tail(max_bytes=10) == "xxxthe end"


def test_the_log_tail_covers_all_ranks_since_their_settings_arrived(directory: TrainerDirectory) -> None:
    first, second = directory.log_path, directory.path / "log-1.txt"
    first.write_text("not started\n")
    second.write_text("not started, too\n")
    directory.begin({"device": "cpu"})
    for path in (first, second, directory.path / "log-10.txt"):
        with path.open("a") as file:
            file.write(f"in {path.name}\n")

    assert list(directory.logs()) == [0, 1, 10]
    assert directory.log_tail() == "in log-1.txt\nin log-10.txt\nin log.txt\n"


def test_unreadable_events_are_treated_as_none(directory: TrainerDirectory) -> None:
    reader = EventReader(directory)
    directory.events_path.mkdir()
    assert reader.read() == []

    directory.events_path.rmdir()
    writer = EventWriter(directory)
    writer.write({"type": "idle"})
    writer.close()

    assert [event["type"] for event in reader.read()] == ["idle"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no json", "is not valid JSON at column 1"),
        ("[1]", "is not a JSON object"),
        ("{}", "has no 'type'"),
        ('{"type": "ready"}', "has no valid time"),
        ('{"type": 1, "seconds": 1}', "one that is not a string"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"type": "a", "seconds": NaN}', "has no valid time"),
        ("\xff", "is not valid JSON"),
    ],
)
def test_an_invalid_line_is_a_malformed_event(directory: TrainerDirectory, line: str, reason: str) -> None:
    reader = EventReader(directory)
    directory.events_path.write_bytes(line.encode("latin-1") + b"\n")

    with pytest.raises(MalformedEvent, match=reason):
        reader.read()


def test_an_endless_line_is_not_read_into_memory(directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "LONGEST_LINE_BYTES", 100)
    directory.events_path.write_bytes(b"x" * 101)

    with pytest.raises(MalformedEvent, match="longer"):
        EventReader(directory).read()


def test_many_events_are_read_in_chunks(directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "LONGEST_LINE_BYTES", 100)
    reader, writer = EventReader(directory), EventWriter(directory)
    writer.write(*({"type": "idle", "number": number} for number in range(20)))
    writer.close()

    parts = [reader.read() for _ in range(20)]

    assert [event["number"] for part in parts for event in part] == list(range(20))
    assert len(parts[0]) < 20


def test_events_that_become_unreadable_have_no_more_to_read(
    directory: TrainerDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "LONGEST_LINE_BYTES", 64)
    directory.events_path.write_text('{"type": "ready", "seconds": 1}\n' * 10)
    reader = EventReader(directory)
    assert (len(reader.read()), reader.has_more) == (2, True)

    directory.events_path.unlink()
    directory.events_path.symlink_to(tmp_path / "elsewhere")

    assert (reader.read(), reader.has_more) == ([], False)


def test_large_file_of_events_is_continued_in_another_and_deleted(
    directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "ROTATED_BYTES", 200)
    writer, reader, found = EventWriter(directory), EventReader(directory), []

    for number in range(50):
        writer.write({"type": "stepped", "step": number})
        if number % 7 == 0:
            found += reader.read()
    writer.close()
    while (events := reader.read()) or reader.has_more:
        found += events

    assert [event["step"] for event in found] == list(range(50))
    assert len(list(directory.path.glob("events*.jsonl"))) == 1

"""Access of the worker's child processes: by the generated rules, and as this machine's kernel enforces them."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import failpoints
from tests.worker.chat_bases import Base
from tests.worker_site import wait_until
from worker.process import confined_child, sandbox, seccomp
from worker.process.confined_child import confined
from worker.process.launcher import run_child
from worker.process.sandbox import Sandbox, description, handled, landlock_abi, rules

ROOT = Path(__file__).parents[3]
NEEDS_SECCOMP = pytest.mark.skipif(not seccomp.is_available(), reason="no seccomp filter here")
NEEDS_LANDLOCK = pytest.mark.skipif(landlock_abi() == 0, reason=description(0))
ACTS = """
import json, os, socket, sys
place, port, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def denied(act):
    try:
        act()
    except OSError as error:
        return type(error).__name__
    return "allowed"
acts = {
    "read a base": lambda: open(f"{place}/bases/file").read(),
    "write a base": lambda: open(f"{place}/bases/file", "a"),
    "add to the bases": lambda: open(f"{place}/bases/new", "w"),
    "read a secret": lambda: open(f"{place}/secret").read(),
    "delete a secret": lambda: os.unlink(f"{place}/secret"),
    "list the data folder": lambda: os.listdir(place),
    "write its folder": lambda: open(f"{place}/own/file", "w"),
    "delete in its folder": lambda: os.unlink(f"{place}/own/file"),
    "make a link": lambda: os.symlink(f"{place}/secret", f"{place}/own/link"),
    "make a second name": lambda: os.link(f"{place}/secret", f"{place}/own/second"),
    "make a pipe": lambda: os.mkfifo(f"{place}/own/pipe"),
    "connect": lambda: socket.create_connection(("127.0.0.1", port), 10),
    "listen": lambda: socket.create_server(("127.0.0.1", 0)),
    "signal the worker": lambda: os.kill(parent, 0),
    "import a package": lambda: __import__("numpy"),
    "write a package": lambda: open(os.path.dirname(os.path.abspath(json.__file__)) + "/new.py", "w"),
    "read the command lines of processes": lambda: open(f"/proc/{parent}/stat").read(),
    "write to the null device": lambda: open("/dev/null", "w").write("x"),
    "open a terminal": lambda: open("/dev/ptmx"),
}
print(json.dumps({name: denied(act) for name, act in acts.items()}))
"""
ALLOWED = {
    "read a base",
    "write its folder",
    "delete in its folder",
    "import a package",
    "read the command lines of processes",
    "write to the null device",
}


def command(argv: list[str], box: Sandbox | None) -> list[str]:
    return argv if box is None else confined(argv, box)


def acted(place: Path, box: Sandbox | None) -> set[str]:
    """Return the names of the ACTS that a child in the sandbox could do."""
    for name in ("own", "bases"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "bases" / "file").write_text("base")
    (place / "secret").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        argv = command([sys.executable, "-c", ACTS, str(place), str(port), str(os.getpid())], box)
        ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return {name for name, outcome in json.loads(ended.stdout).items() if outcome == "allowed"}


@NEEDS_LANDLOCK
def test_a_trainer_accesses_only_base_models_and_its_own_folder(tmp_path: Path) -> None:
    box = sandbox.trainer(tmp_path / "own", bases_dir=tmp_path / "bases", tcp=False)

    done = acted(tmp_path, box)

    beyond = set[str]()
    if landlock_abi() < 4:
        beyond |= {"connect", "listen"}
    if landlock_abi() < 6:
        beyond |= {"signal the worker"}
    assert done == ALLOWED | beyond


@NEEDS_LANDLOCK
def test_trainers_that_communicate_have_tcp(tmp_path: Path) -> None:
    box = sandbox.trainer(tmp_path / "own", bases_dir=tmp_path / "bases", tcp=True)

    assert {"connect", "listen"} <= acted(tmp_path, box)


def test_without_a_sandbox_the_denied_acts_are_allowed(tmp_path: Path) -> None:
    """Shows that the sandbox, and nothing else, denies these acts in the other tests."""
    everything = acted(tmp_path, None)

    assert {"read a secret", "delete a secret", "make a link", "connect", "signal the worker"} <= everything


@NEEDS_LANDLOCK
@pytest.mark.parametrize("name", ["model.safetensors", "additional_chat_templates/tool_use.jinja"])
def test_an_import_can_read_the_link_targets_of_its_source(tmp_path: Path, name: str) -> None:
    """The cache of the hub contains such links."""
    blob, work, link = tmp_path / "blobs" / "weights", tmp_path / "own", tmp_path / "snapshot" / name
    blob.parent.mkdir()
    blob.write_text("weights")
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    work.mkdir()
    box = sandbox.base_import(work, source=tmp_path / "snapshot")
    code = f"print(open({str(link)!r}).read())"

    ended = subprocess.run(confined([sys.executable, "-c", code], box), cwd=ROOT, capture_output=True, check=False)

    assert ended.stdout == b"weights\n", ended.stderr
    assert "read a secret" not in acted(tmp_path, box)


@NEEDS_LANDLOCK
def test_an_import_can_read_a_gguf_file_and_the_chat_template_next_to_it(tmp_path: Path) -> None:
    work = tmp_path / "own"
    work.mkdir()
    paths = [tmp_path / name for name in ("model.gguf", "tokenizer_config.json", "other.txt")]
    for path in paths:
        path.write_text(path.name)
    box = sandbox.base_import(work, source=paths[0])
    code = "import sys\nfor path in sys.argv[1:]: print(open(path).read(), flush=True)"

    argv = confined([sys.executable, "-c", code, *map(str, paths)], box)
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, check=False)

    assert ended.stdout.split() == [b"model.gguf", b"tokenizer_config.json"], ended.stderr
    assert b"PermissionError" in ended.stderr


@NEEDS_LANDLOCK
def test_a_failpoint_that_kills_once_works_in_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = tmp_path / "gates" / "here"
    gate.parent.mkdir()
    gate.touch()
    monkeypatch.setenv(failpoints.VARIABLE, f"here:kill-if={gate}")
    (tmp_path / "own").mkdir()
    box = sandbox.trainer(tmp_path / "own", bases_dir=tmp_path / "bases", tcp=False)
    code = "from catalog import failpoints; failpoints.pass_by('here')"

    statuses = [
        subprocess.run(confined([sys.executable, "-c", code], box), cwd=ROOT, check=False).returncode for _ in range(2)
    ]

    assert statuses == [-signal.SIGKILL, 0]


SOCKETS = """
import ctypes, json, socket, sys
def outcome(act):
    try:
        return act() or "allowed"
    except OSError as error:
        return error.strerror
def io_uring():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(425, 1, None) < 0:
        raise OSError(ctypes.get_errno(), "Operation not permitted" if ctypes.get_errno() == 1 else "another error")
def connect():
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
def pair(kind):
    with socket.socketpair(socket.AF_UNIX, kind)[0] as end:
        if kind is socket.SOCK_DGRAM:
            end.connect(sys.argv[2])
print(json.dumps({
    "connect": outcome(connect),
    "datagram": outcome(lambda: pair(socket.SOCK_DGRAM)),
    "stream": outcome(lambda: pair(socket.SOCK_STREAM)),
    "packets": outcome(lambda: pair(socket.SOCK_SEQPACKET)),
    "io_uring": outcome(io_uring),
    "TCP": outcome(lambda: socket.socket(socket.AF_INET).close()),
}))
"""
DENIED = "Operation not permitted"


def outcomes_of_sockets(place: Path, box: Sandbox | None) -> dict[str, str]:
    """Return the outcome of each of SOCKETS for a child in the sandbox."""
    stream, datagram = place / "stream", place / "datagram"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        server.bind(str(stream))
        server.listen()
        receiver.bind(str(datagram))
        argv = command([sys.executable, "-c", SOCKETS, str(stream), str(datagram)], box)
        ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@NEEDS_SECCOMP
@pytest.mark.parametrize("kind", ["trainer", "tokenization", "import"])
def test_no_child_connects_to_a_unix_socket_by_its_path(tmp_path: Path, kind: sandbox.Kind) -> None:
    own = tmp_path / "own"
    own.mkdir()
    box = {
        "trainer": lambda: sandbox.trainer(own, bases_dir=tmp_path, tcp=True),
        "tokenization": lambda: sandbox.tokenization(own, base_dir=None, num_bytes=100),
        "import": lambda: sandbox.base_import(own, source=None),
    }[kind]()

    found = outcomes_of_sockets(tmp_path, box)

    denied = {"connect": DENIED, "datagram": DENIED, "io_uring": DENIED}
    assert found == denied | {"stream": "allowed", "packets": "allowed", "TCP": "allowed"}


@NEEDS_SECCOMP
def test_a_gpu_trainer_keeps_the_unix_sockets_that_cuda_uses(tmp_path: Path) -> None:
    box = sandbox.trainer(tmp_path, bases_dir=tmp_path, tcp=False, gpu=True)

    assert outcomes_of_sockets(tmp_path, box)["connect"] == "allowed"


@pytest.mark.parametrize("kind", ["trainer", "tokenization", "import"])
def test_only_a_gpu_trainer_can_write_more_than_the_memory_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: sandbox.Kind
) -> None:
    monkeypatch.setattr(sandbox, "DEV", tmp_path)
    for name in ("null", "urandom", "nvidia0", "nvidiactl", "nvidia-uvm", "sda", "ptmx", "snd"):
        (tmp_path / name).touch()

    def devices(box: Sandbox) -> set[str]:
        writable = (path for path, rights in rules(box) if rights & sandbox.WRITE_FILE)
        return {Path(path).name for path in writable if Path(path).parent == tmp_path and Path(path).exists()}

    assert devices(Sandbox(kind=kind)) == {"null", "urandom"}
    assert devices(Sandbox(kind="trainer", gpu=True)) == {"null", "urandom", "nvidia0", "nvidiactl", "nvidia-uvm"}
    assert all(path != str(tmp_path) or not rights & sandbox.WRITE_FILE for path, rights in rules(Sandbox(kind=kind)))


def test_secrets_of_a_checkout_in_opt_are_not_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "ROOT", Path("/opt/lorry"))

    readable = [Path(path) for path, rights in rules(Sandbox(kind="trainer")) if rights & sandbox.READ_FILE]

    assert Path("/opt/lorry/worker") in readable
    assert not [path for path in readable if Path("/opt/lorry/.env").is_relative_to(path)]


def test_an_import_from_the_hub_can_use_both_of_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token and the data of hf_xet are in HF_HOME, even if the cache of repositories is elsewhere."""
    home, cache = tmp_path / "home", tmp_path / "cache"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))

    box = sandbox.base_import(tmp_path / "own", source=None)

    assert {str(home), str(cache)} <= {*box.links}
    assert home.is_dir()
    assert cache.is_dir()


def test_a_child_whose_sandbox_cannot_be_applied_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def refused(_: Sandbox) -> None:
        raise OSError(errno.E2BIG, "Too many rules")

    monkeypatch.setattr(confined_child, "die_with_parent", lambda _: None)
    monkeypatch.setattr(os, "execv", lambda path, _: begun.append(path))
    monkeypatch.setattr(confined_child, "apply", refused)

    with pytest.raises(SystemExit) as ended:
        confined_child.main([str(os.getppid()), Sandbox(kind="trainer").as_argument(), "/bin/true"])

    assert (ended.value.code, begun) == (sandbox.REFUSED, [])


@pytest.mark.parametrize("abi", range(1, 9))
def test_every_landlock_abi_handles_its_rights_and_reports_its_gaps(abi: int) -> None:
    files, tcp, scopes = handled(abi)

    assert files & sandbox.MAKE_SYM
    assert bool(files & sandbox.REFER) == (abi >= 2)
    assert bool(files & sandbox.TRUNCATE) == (abi >= 3)
    assert bool(tcp) == ("TCP" not in description(abi)) == (abi >= 4)
    assert bool(files & sandbox.IOCTL_DEV) == (abi >= 5)
    assert bool(scopes) == (abi >= 6)
    assert f"landlock ABI {abi}" in description(abi)


@given(data=st.data())
def test_no_rule_allows_writing_executables_or_links_outside_an_import(data: st.DataObject) -> None:
    folders = st.lists(st.sampled_from(["/data/work/own", "/data/work/cache"]), max_size=3).map(tuple)
    box = Sandbox(kind="trainer", reads=("/data/bases",), writes=data.draw(folders), links=data.draw(folders))

    for path, rights in rules(box):
        writes = rights & (sandbox.WRITE_FILE | sandbox.MAKE_REG | sandbox.REMOVE_FILE | sandbox.MAKE_DIR)
        assert not writes or path.startswith("/dev/") or path in box.writes + box.links
        assert not rights & sandbox.MAKE_SYM or path in box.links
        assert not (rights & sandbox.EXECUTE and writes)
        assert not rights & (sandbox.MAKE_CHAR | sandbox.MAKE_BLOCK | sandbox.MAKE_FIFO)
        assert path not in ("/", "/etc", "/home", "/root", "/var", "/tmp", "/run", "/opt", "/dev", str(Path.home()))


def test_a_sandbox_round_trips_through_its_argument() -> None:
    box = Sandbox(kind="import", reads=("/a b",), links=("/ä",), tcp=True, limits={"cpu": 5})

    assert Sandbox.from_argument(box.as_argument()) == box


def test_the_confinement_of_each_kind_of_child_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sandbox._announced.clear()

    for _ in range(2):
        sandbox.announce(Sandbox(kind="trainer"))
        sandbox.announce(Sandbox(kind="import"))

    output = [record.getMessage() for record in caplog.records]
    assert [line.split(";")[0] for line in output] == [
        f"{description(landlock_abi())} of {kind} processes".split(";")[0] for kind in ("trainer", "import")
    ]


@pytest.mark.parametrize(
    ("gpu", "is_available", "words"),
    [(False, True, "no Unix sockets"), (False, False, "may open Unix sockets"), (True, True, "may open Unix sockets")],
)
def test_the_log_states_whether_a_child_may_open_unix_sockets(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, *, gpu: bool, is_available: bool, words: str
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sandbox, "_announced", set())
    monkeypatch.setattr(seccomp, "is_available", lambda: is_available)

    sandbox.announce(Sandbox(kind="trainer", gpu=gpu))

    assert words in caplog.text
    assert is_available or caplog.records[0].levelno == logging.WARNING


REPEATS = "{% for m in messages %}{{ 'a' * 10**10 }}{{ m.content }}{% endfor %}"
LOOPS = (
    "{% for m in messages %}{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}{{ m.content }}{% endfor %}"
)


def exhaust_processor_time(pid: int, *, opens: Path) -> None:
    """Lower the limit of a process to the time that it has used, once it has opened a file."""
    wait_until(lambda: str(opens) in [file.path for file in psutil.Process(pid).open_files()])
    soft, hard = resource.prlimit(pid, resource.RLIMIT_CPU)
    assert soft < hard, "SIGKILL comes first"
    resource.prlimit(pid, resource.RLIMIT_CPU, (1, hard))


@pytest.mark.parametrize(
    ("template", "resource_name"), [(REPEATS, "memory"), (LOOPS, "processor time")], ids=["memory", "time"]
)
def test_an_unbounded_chat_template_results_in_a_user_error(
    tmp_path: Path,
    make_base: Callable[[str | None], Base],
    template: str,
    resource_name: str,
) -> None:
    base, work = make_base(template), tmp_path / "work"
    work.mkdir()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (work / "source.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    box = sandbox.tokenization(work, base_dir=base.folder, num_bytes=100)
    arguments: dict[str, Any] = {"base_dir": str(base.folder), "max_length": 64, "data": {}}
    arguments |= {name: str(work / name) for name in ("source.jsonl", "out", "result", "details")}
    arguments["source"] = arguments.pop("source.jsonl")
    (work / "arguments.json").write_text(json.dumps(arguments))

    child = run_child(
        "worker.children.tokenizer.main", str(work / "arguments.json"), log_path=work / "log.txt", box=box
    )
    if template == LOOPS:
        exhaust_processor_time(child.pid, opens=work / "source.jsonl")
    status = child.wait()

    assert status == 0, (work / "log.txt").read_text()
    refusal = json.loads((work / "result").read_text())["refusal"]
    assert refusal["code"] == "preparation_failed"
    assert f"Tokenizing the file takes more {resource_name}" in refusal["message"]


def test_limits_of_a_child_grow_with_its_input_and_cannot_be_raised(tmp_path: Path) -> None:
    small = sandbox.tokenization(tmp_path, base_dir=None, num_bytes=0).limits
    large = sandbox.tokenization(tmp_path, base_dir=None, num_bytes=2**30).limits
    box = Sandbox(kind="tokenization", limits=small)
    code = (
        "import resource\n"
        "for name in ('DATA', 'CPU', 'FSIZE'):\n"
        "    print(*resource.getrlimit(getattr(resource, f'RLIMIT_{name}')))\n"
    )

    output = subprocess.run(
        confined([sys.executable, "-c", code], box), cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    assert all(large[name] > small[name] for name in small)
    soft_and_hard = [tuple(map(int, line.split())) for line in output.splitlines()]
    assert [soft for soft, _ in soft_and_hard] == [small["data"], small["cpu"], small["fsize"]]
    assert all(hard != resource.RLIM_INFINITY for _, hard in soft_and_hard)

"""The commands of README.md, the tutorials and the how-to guides work, and print what the pages show.

Each page runs from top to bottom, as for a new user. Its own service trains a tiny model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import tiny_base
from tests.docs import hub
from tests.docs.expected_output import matches
from tests.docs.interpreters import Failed, PageSession, environment
from tests.docs.pages import ROOT, Block, blocks, name, pages
from tests.docs.static_checks import problems, problems_of_sentences
from tests.services.running import free_port

PAGES = pages()
FAST = {"docs/how-to/connect.md", "docs/how-to/install.md", "docs/tutorials/library.md"}
"""Pages that train no job. The other pages take up to a few minutes on two busy cores, and are slow tests."""
REPLACED = {
    r"^python3 -m venv \.venv(?: && \. \.venv/bin/activate)?$|^\. \.venv/bin/activate$": ":",
    r"^pip install (?:torch|openai|\./client) ?.*$": ":",  # tests/deploy/test_distributions.py installs the packages
    r"^lorry up(?: --detach)?$": "lorry up --detach --devices cpu --port {port}",  # a reader opens another terminal
    r"http://127\.0\.0\.1:8472": "http://127.0.0.1:{port}",
    r'"lorry_key-…"': '__import__("lorry").Lorry().api_key',
    r"(?<= )/models/smollm2": "$PWD/smollm2",  # a reader copies the folder to another machine
    r"/var/backups/lorry": "$PWD/backups",
}
"""Parts of commands, with their replacement in tests."""
MAX_POSITIONS = 1024
"""The tiny model has a token per character, so rows with tools have hundreds of tokens."""
ADD_MODEL = f"lorry models add smollm2 {hub.MODEL}"
TRAIN = "lorry jobs submit smollm2 chats.jsonl --epochs 1 --suffix support --watch"

pytestmark = pytest.mark.timeout(600)
EACH = pytest.mark.parametrize("page", PAGES, ids=name)


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables that make processes use the Hub of the tests."""
    folder = tmp_path_factory.mktemp("hub")
    model = tiny_base.make(folder / "model")
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": MAX_POSITIONS}))
    with hub.serving(model) as endpoint:
        yield {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}


@EACH
def test_blocks_are_valid(page: Path) -> None:
    found = [f"{name(page)}:{block.line}: {problem}" for block in blocks(page) for problem in problems(block)]

    assert found == []


def test_fixes_in_the_tables_of_troubleshoot_are_complete_commands() -> None:
    text = (ROOT / "docs/how-to/troubleshoot.md").read_text("utf-8")

    assert list(problems_of_sentences(text)) == []


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if name(page) in FAST else [pytest.mark.slow]) for page in PAGES], ids=name
)
def test_page_runs(page: Path, tmp_path: Path, hub_environment: dict[str, str]) -> None:
    run = [block for block in blocks(page) if block.not_run is None]
    if not run:
        return
    home, folder = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    env = environment(home, ROOT) | hub_environment
    port = free_port()
    with _service_stops(env), PageSession(folder, env) as session:
        _prepare(page, run, session, folder, port)
        for block in run:
            _run(page, block, session, port)


def test_examples_are_the_rows_of_the_tutorial(tmp_path: Path) -> None:
    (block,) = (block for block in blocks(ROOT / "docs/tutorials/first-adapter.md") if "make_data.py" in block.text)

    script = block.text.partition("<<'EOF'\n")[2].partition("\nEOF\n")[0]
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)

    assert (ROOT / "examples/chats.jsonl").read_bytes() == (tmp_path / "chats.jsonl").read_bytes()


def _prepare(page: Path, run: list[Block], session: PageSession, folder: Path, port: int) -> None:
    """Create the state that a page requires. A tutorial requires none.

    Other pages start with data files. A page that uses the service without starting it gets a running service with
    a base model. If the page trains no adapter, the service has trained one.
    """
    if page.parent.name == "tutorials":
        return
    (folder / "examples").symlink_to(ROOT / "examples")
    tiny_base.write_chat(folder / "chats.jsonl", 30)
    tiny_base.write_chat(folder / "valid.jsonl", 8, seed=1)
    tiny_base.write_pairs(folder / "pairs.jsonl", 30)
    tiny_base.write_pairs(folder / "valid-pairs.jsonl", 8, seed=1)
    text = "".join(block.text for block in run if block.language == "sh")
    first = re.search(r"^ *lorry (up|down)\b", text, re.MULTILINE)
    if (first is None or first[1] == "down") and re.search(r"\blorry\b", text):
        session.run("sh", _in_tests("lorry up --detach", port))
        if re.search(r"^lorry models add smollm2 ", text, re.MULTILINE) is None:
            session.run("sh", ADD_MODEL)
            if "lorry jobs submit" not in text:
                session.run("sh", TRAIN)


def _run(page: Path, block: Block, session: PageSession, port: int) -> None:
    place = f"{name(page)}:{block.line}"
    try:
        printed = session.run(block.language, _in_tests(block.text, port))
    except Failed as error:
        pytest.fail(f"{place}\n{block.text}\n{error}", pytrace=False)
    if block.output is not None and not matches(block.output, printed):
        pytest.fail(f"{place}: the page shows\n{block.output}\nbut the commands printed\n{printed}", pytrace=False)


def _in_tests(text: str, port: int) -> str:
    for part, replacement in REPLACED.items():
        text = re.sub(part, replacement.format(port=port), text, flags=re.MULTILINE)
    return text


@contextmanager
def _service_stops(env: dict[str, str]) -> Iterator[None]:
    try:
        yield
    finally:
        argv = [sys.executable, "-P", "-m", "lorry", "down"]
        subprocess.run(argv, env=env, cwd=env["HOME"], capture_output=True, check=False, timeout=120)

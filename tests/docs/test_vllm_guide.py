"""The guide starts vLLM on a CPU with the options that Lorry itself uses."""

from __future__ import annotations

from lorry.cli import vllm
from tests.docs.pages import ROOT


def test_options_of_a_cpu_are_those_of_lorry() -> None:
    guide = (ROOT / "docs" / "how-to" / "serve.md").read_text()

    assert f" {' '.join(vllm._ON_CPU)} " in guide

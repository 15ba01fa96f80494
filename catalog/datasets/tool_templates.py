"""Rejects conversations with tools if the chat template of the base model does not render them."""

from __future__ import annotations

TOOL_MODELS = "Qwen2.5, Qwen3-Instruct-2507, Llama 3.1 or later, or SmolLM2-1.7B"
"""Models whose templates render tools and tool calls, and keep earlier messages unchanged."""


def refusal(what: str) -> tuple[str, str, str]:
    """Return code, message and remedy. what: `tools` or `tool calls`."""
    return (
        "template_without_tools",
        f"The base model's chat template does not render {what}, which this conversation has.",
        f"Use a base model whose template supports tools, such as {TOOL_MODELS}, or add a copy of the base model's "
        "folder under another name, with a chat_template.jinja that renders 'tools' and 'tool_calls'.",
    )

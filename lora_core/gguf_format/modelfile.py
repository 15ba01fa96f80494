# pyright: basic
"""Writes a Modelfile, with which `ollama create` adds a GGUF file to Ollama."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lora_core.gguf_format.tokenizer import adds

CONTENT = "{{ .Content }}"
MARKS = {"system": "\ue000s", "user": "\ue000u", "assistant": "\ue000a"}
"""Texts by role that occur in no template, and that change if a template changes the case of letters."""

TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}


def write_modelfile(model_dir: Path, path: Path, *, gguf_name: str) -> None:
    """Write a Modelfile next to the GGUF file: the file, the prompt template and the stop tokens.

    A chat template in Jinja is converted if it writes each message alone. Ollama looks up all others in its own list of
    known templates, by the template in the GGUF file.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    lines = [f"FROM ./{gguf_name}"]
    template = _template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in _stop_texts(tokenizer, model_dir)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _stop_texts(tokenizer: Any, model_dir: Path) -> list[str]:
    """Return the texts of the tokens that end an answer."""
    ends: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    generation = model_dir / "generation_config.json"
    if generation.is_file():
        stated = json.loads(generation.read_text("utf-8")).get("eos_token_id")
        ends += [stated] if isinstance(stated, int) else list(stated or [])
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in dict.fromkeys(ends) if token < len(tokenizer)]


def _template(tokenizer: Any) -> str | None:
    """Return the chat template in Ollama's notation, or None if there is none, or it does more than to surround each
    message by fixed texts and to begin with a default system message. A template that renders tools does more."""
    if isinstance(tokenizer.chat_template, dict):  # it has templates with names, such as one for tools
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not isinstance(tokenizer.chat_template, str):
        return None
    try:
        return _converted(tokenizer)
    except Exception:  # noqa: BLE001  (a template may raise anything, for example for two messages of a user)
        return None


def _converted(tokenizer: Any) -> str | None:
    if _rendered(tokenizer, "user", tools=[TOOL]) != _rendered(tokenizer, "user"):
        return None
    parts = {role: _parts(tokenizer, role) for role in MARKS}
    messages = {role: MARKS[role].join(parts[role]) for role in MARKS}
    alone, asked = _rendered(tokenizer, "user"), _rendered(tokenizer, "user", add_generation_prompt=True)
    default, prompt = alone.removesuffix(messages["user"]), asked.removeprefix(alone)
    conversations = [["system", "user", "assistant", "user"], ["user", "assistant", "user", "assistant"]]
    for roles in conversations:
        expected = "".join(messages[role] for role in roles)
        if roles[0] != "system":
            expected = default + expected
        if _rendered(tokenizer, *roles) != expected:
            return None
    texts = [default, prompt, *(text for pair in parts.values() for text in pair)]
    if any('"""' in text or "{{" in text for text in texts):
        return None
    cases = [f'eq .Role "{role}" }}}}{CONTENT.join(pair)}' for role, pair in parts.items()]
    start = f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if default else ""
    return f"{start}{{{{ range .Messages }}}}{{{{ if {'{{ else if '.join(cases)}{{{{ end }}}}{{{{ end }}}}{prompt}"


def _parts(tokenizer: Any, role: str) -> tuple[str, str]:
    """Return the texts before and after a message of the role: after a message of the user or, for a system message,
    at the start."""
    if role == "system":
        start, rest = _rendered(tokenizer, role, "user").split(MARKS[role])
        return start, rest.removesuffix(MARKS["user"].join(_parts(tokenizer, "user")))
    first = ["user", "assistant"] if role == "user" else ["user"]
    rest = _rendered(tokenizer, *first, role).removeprefix(_rendered(tokenizer, *first))
    start, end = rest.split(MARKS[role])
    return start, end


def _rendered(tokenizer: Any, *roles: str, **options: Any) -> str:
    """Return the text of the template, without the first token if llama.cpp adds it itself."""
    messages = [{"role": role, "content": MARKS[role]} for role in roles]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    return text.removeprefix(tokenizer.bos_token) if adds(tokenizer, "bos") else text

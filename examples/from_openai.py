"""Starts a job on Lorry with the settings of an OpenAI fine-tuning job, and by default with its files.

    python examples/from_openai.py ftjob-abc123 --model smollm2-135m --dry-run

Reads the job with OPENAI_API_KEY (and OPENAI_BASE_URL), and finds Lorry like the `lorry` command. Settings that can't
be transferred are printed with the reason. --dry-run prints the request without sending it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

from lorry import Lorry, LorryError

NUMBERS = {"supervised": ("batch_size", "n_epochs"), "dpo": ("batch_size", "n_epochs", "beta")}
"""Hyperparameters of a method that have the same meaning in both APIs."""
LARGEST = {"batch_size": 1024, "n_epochs": 100}
FILE_ID = re.compile(r"file-[A-Za-z0-9]+")
Json = dict[str, Any]


class CantMove(Exception):
    """The reason why the script stops, as a sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    asked = _arguments(argv)
    try:
        with openai.OpenAI() as source, Lorry() as lorry:
            return _move(asked, source, lorry)
    except (CantMove, LorryError, openai.OpenAIError, OSError) as error:
        sys.stderr.write(f"Error: {error.sentence() if isinstance(error, LorryError) else error}\n")
        return 1


def translated(job: Json, *, model: str, keep_rate: bool = False) -> tuple[Json, list[str]]:
    """Return the body for Lorry without its files, and the skipped settings with reasons. Raises CantMove."""
    body: Json = {"model": model, "seed": job.get("seed")}
    left_out: list[str] = []
    body["method"] = _method(job, left_out, keep_rate=keep_rate)
    body["suffix"] = _suffix(job.get("fine_tuned_model"), left_out)
    body["metadata"] = job.get("metadata") or None
    if job.get("integrations"):
        left_out.append("integrations: configure them on Lorry, if its workers have them (docs/how-to/trackers.md).")
    return {name: value for name, value in body.items() if value is not None}, left_out


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start a job on Lorry from an OpenAI fine-tuning job.")
    parser.add_argument("job", help="id of the OpenAI job, ftjob-…")
    parser.add_argument("--model", required=True, help="name of the base model on Lorry")
    parser.add_argument("--training", help="training data: a path, or a file id on Lorry (default: the job's file)")
    parser.add_argument("--validation", help="validation data: a path, or a file id on Lorry (default: the job's file)")
    parser.add_argument("--keep-rate", action="store_true", help="keep learning_rate_multiplier unchanged")
    parser.add_argument("--dry-run", action="store_true", help="print the request without sending it")
    return parser.parse_args(argv)


def _move(asked: argparse.Namespace, source: openai.OpenAI, lorry: Lorry) -> int:
    job = source.fine_tuning.jobs.retrieve(asked.job).to_dict()
    body, left_out = translated(job, model=asked.model, keep_rate=asked.keep_rate)
    for line in left_out:
        sys.stderr.write(f"Skipped: {line}\n")
    if not asked.dry_run:
        lorry.models.get(body["model"])  # fail before any file is copied
    wanted = {"training_file": asked.training, "validation_file": asked.validation}
    for field, given in wanted.items():
        theirs = job.get(field)
        if given is None and theirs is None:
            continue
        if asked.dry_run:
            body[field] = given or f"a copy of {theirs}"
        else:
            body[field] = _sent(lorry, given) if given else _copied(source, lorry, str(theirs))
    if asked.dry_run:
        sys.stdout.write(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
        return 0
    made = lorry.jobs.create(model=body["model"], training_file=body["training_file"], extra_body=body)
    sys.stdout.write(f"{made.id}\n")
    sys.stderr.write(f"Follow it with: lorry jobs watch {made.id}\n")
    return 0


def _method(job: Json, left_out: list[str], *, keep_rate: bool) -> Json:
    """Return the method. Older jobs have their hyperparameters only at the top level."""
    method: Json = job.get("method") or {"type": "supervised"}
    kind = str(method.get("type"))
    if kind not in NUMBERS:
        raise CantMove(
            f"Lorry doesn't support the method {kind}. Supported methods: supervised, dpo, orpo, simpo, kto."
        )
    given: Json = (method.get(kind) or {}).get("hyperparameters") or job.get("hyperparameters") or {}
    kept: Json = {}
    for name, value in given.items():
        reason = _why_not(kind, name, value, keep_rate=keep_rate)
        if value is not None and value != "auto" and reason is None:
            kept[name] = value
        elif reason is not None:
            left_out.append(f"{name}={value}: {reason}")
    return {"type": kind, kind: {"hyperparameters": kept}} if kept else {"type": kind}


def _why_not(kind: str, name: str, value: object, *, keep_rate: bool) -> str | None:
    """Return the reason to skip a hyperparameter; None for one to keep, and for one without a value."""
    if value is None or value == "auto":
        return None
    if name == "learning_rate_multiplier":
        return None if keep_rate else "it multiplies the default rate of another model; --keep-rate keeps it."
    if name not in NUMBERS[kind]:
        return "Lorry has no such hyperparameter for this method."
    most = LARGEST.get(name)
    return f"exceeds Lorry's maximum of {most:,}." if most and isinstance(value, int) and value > most else None


def _suffix(model: str | None, left_out: list[str]) -> str | None:
    """Return the suffix, which only the name of the model contains: ft:BASE:ORGANIZATION:SUFFIX:ID."""
    parts = (model or "").split(":")
    suffix = parts[3] if len(parts) > 4 else ""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", suffix).strip("._-")[:64]
    if plain != suffix:
        left_out.append(f"suffix {suffix!r}: changed to {plain!r}." if plain else f"suffix {suffix!r}.")
    return plain or None


def _sent(lorry: Lorry, given: str) -> str:
    """Upload a path; return an id unchanged."""
    if FILE_ID.fullmatch(given) and not Path(given).exists():
        return given
    return lorry.files.upload(given).id


def _copied(source: openai.OpenAI, lorry: Lorry, file_id: str) -> str:
    """Copy a file through a temporary file on this machine, in pieces."""
    with tempfile.TemporaryDirectory() as folder:
        name = Path(source.files.retrieve(file_id).filename).name or "data.jsonl"
        path = Path(folder) / name
        try:
            with source.files.with_streaming_response.content(file_id) as content:
                content.stream_to_file(path)
        except openai.APIStatusError as error:
            raise CantMove(
                f"{file_id} can't be downloaded: {error.message} Pass your own copy with --training or --validation."
            ) from error
        copy = lorry.files.upload(path)
    sys.stderr.write(f"Copied {file_id} as {copy.id}.\n")
    return copy.id


if __name__ == "__main__":
    sys.exit(main())

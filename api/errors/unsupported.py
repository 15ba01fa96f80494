"""Error messages for OpenAI endpoints and for other trainers' field names that Lorry does not have."""

from __future__ import annotations

import re
from collections.abc import Collection

INSTEAD_OF_REINFORCEMENT = (
    "Use a preference method (dpo, orpo, simpo, kto). Set evaluation.samples to see sample outputs of a job."
)
NOT_OFFERED = {
    re.compile(r"/v1/fine_tuning/alpha/graders/[^/]*"): "graders_not_offered",
    re.compile(r"/v1/(responses|embeddings|assistants|threads|moderations|images|audio)(/.*)?"): "endpoint_not_offered",
    re.compile(r"/v1/organization(/.*)?"): "administration_not_offered",
}
"""The error of each group of paths that Lorry does not support."""


def find(path: str) -> str | None:
    """Return the name of the error's text; None for other paths."""
    return next((name for paths, name in NOT_OFFERED.items() if paths.fullmatch(path)), None)


OTHER_NAMES = {
    "load_in_4bit": "'quantization' with the value \"nf4\"",
    "load_in_8bit": "'quantization' with the value \"int8\"",
    "quantisation": "'quantization'",
    "lr": "'optimizer.learning_rate'",
    "r": "'lora.rank'",
    "lora_r": "'lora.rank'",
    "lora_rank": "'lora.rank'",
    "lora_alpha": "'lora.alpha'",
    "lora_dropout": "'lora.dropout'",
    "lr_scheduler_type": "'schedule.type'",
    "optim": "'optimizer.type'",
    "adam_beta1": "'optimizer.beta1'",
    "adam_beta2": "'optimizer.beta2'",
    "adam_epsilon": "'optimizer.eps'",
    "max_seq_length": "'max_length'",
    "max_seq_len": "'max_length'",
    "sequence_len": "'max_length'",
    "cutoff_len": "'max_length'",
    "eval_steps": "'evaluation.every_steps'",
    "save_steps": "'checkpoint_every_steps'",
    "load_best_model_at_end": "'evaluation.keep' with the value \"best\"",
    "early_stopping_patience": "'early_stopping.patience'",
}
"""Lorry's field, by the field's name in transformers, PEFT, TRL, bitsandbytes or another trainer."""

OLD_NAMES = {
    "functions": ("tools", 'Use \'tools\', with {"type": "function", "function": ...} for each function.'),
    "function_call": ("tool_choice", "Use 'tools', and 'tool_choice' with the value \"auto\" or \"none\"."),
}
"""By a deprecated parameter of OpenAI: the parameter that replaced it, and the remedy."""

UNSUPPORTED_VALUES = {
    "tool_choice": 'Lorry does not force a model to call a tool. Use "auto", and ask for the call in the messages.',
    "response_format.type": "Lorry does not force a model to write JSON. Train the model on answers in JSON, or ask "
    "for JSON in the messages, and leave out 'response_format'.",
    "store": "Lorry does not store answers. Leave out 'store', and keep the answers that you need.",
    "stream_options.include_obfuscation": "Leave it out.",
    "echo": "Leave out 'echo', and put the prompt before the answer.",
    "best_of": "Leave out 'best_of'. To choose among several answers, use 'n' and 'logprobs'.",
}
"""The remedy, by a parameter of OpenAI of which Lorry supports only the default or some values."""


def replacement(path: str, known: Collection[str]) -> str | None:
    """Return the remedy for a deprecated parameter; None if a request with the fields `known` lacks its successor."""
    successor, remedy = OLD_NAMES.get(path, ("", ""))
    return remedy if successor in known else None


def known_elsewhere(path: str) -> str | None:
    """Return a question with Lorry's field for the last part of `path`; None if the name is not in OTHER_NAMES."""
    alternative = OTHER_NAMES.get(path.rpartition(".")[2])
    return None if alternative is None else f"Did you mean {alternative}?"

"""What other trainers call a field of a job: a person who brings such a name is told ours."""

from __future__ import annotations

OTHER_NAMES = {
    "load_in_4bit": "'quantisation' with the value \"nf4\"",
    "load_in_8bit": "'quantisation' with the value \"int8\"",
    "quantization": "'quantisation'",
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
"""By the name that transformers, PEFT, TRL, bitsandbytes or another trainer gives it."""


def known_elsewhere(path: str) -> str | None:
    """Our field for the last part of `path`, as a question; None where nobody else has it either."""
    ours = OTHER_NAMES.get(path.rpartition(".")[2])
    return None if ours is None else f"Did you mean {ours}?"

"""What an option of `lorry jobs submit` may be where it is one of a few words."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """What the adapter learns by: answers, pairs of a better and a worse one, or answers with labels."""

    supervised = "supervised"
    dpo = "dpo"
    orpo = "orpo"
    simpo = "simpo"
    kto = "kto"


class Priority(StrEnum):
    """Whose turn comes first."""

    urgent = "urgent"
    normal = "normal"
    batch = "batch"


class Precision(StrEnum):
    """Of the base model's weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Quantisation(StrEnum):
    """How the base model's linear layers are held."""

    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class Schedule(StrEnum):
    """How the learning rate goes down from its peak."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class Optimizer(StrEnum):
    """What turns gradients into updates."""

    adamw = "adamw"
    sgd = "sgd"
    adafactor = "adafactor"


class Loss(StrEnum):
    """Which answers of a chat are learnt."""

    assistant = "assistant"
    last_turn = "last_turn"


class Overflow(StrEnum):
    """What becomes of a row that is too long."""

    truncate = "truncate"
    drop = "drop"
    split_ = "split"  # str has a split of its own


class Keep(StrEnum):
    """Whose weights become the adapter."""

    last = "last"
    best = "best"

"""What a job learns by: from answers (`supervised`), from pairs of them (`dpo`, `orpo`, `simpo`), or from answers that
were called desirable or not (`kto`).

OpenAI's form: a type, and under the type's name its numbers. `resolve_supervised` and `resolve_preference` make every
`auto` a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from catalog.datasets.formats import DataKind
from catalog.spec.strict import Auto, Strict
from catalog.spec.training import BASE_LEARNING_RATE, HIGHEST_RATE

PREFERENCE_MULTIPLIER = 0.1
"""What `auto` multiplies it by where answers are compared: a rate of 2e-5. At rates that suit plain answers, a few
steps of DPO are enough to make both answers unlikely."""

AUTO_EPOCHS = 3
Json = dict[str, Any]
MethodType = Literal["supervised", "dpo", "orpo", "simpo", "kto"]
Beta = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Weight = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


class Hyperparameters(Strict):
    """OpenAI's three numbers."""

    batch_size: Annotated[int, Field(ge=1, le=1024)] | Auto = Field(
        default="auto", description="Sequences, or pairs of them, per optimizer step."
    )
    learning_rate_multiplier: (
        Annotated[float, Field(gt=0, le=HIGHEST_RATE / BASE_LEARNING_RATE, allow_inf_nan=False)] | Auto
    ) = Field(default="auto", description=f"auto: 1, or {PREFERENCE_MULTIPLIER} where answers are compared.")
    n_epochs: Annotated[int, Field(ge=1, le=100)] | Auto = Field(default="auto", description=f"auto: {AUTO_EPOCHS}.")


class SupervisedHyperparameters(Hyperparameters):
    """Cross-entropy of the answers."""

    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Part of each label's probability that is spread evenly over the vocabulary, in training alone.",
    )
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Scale of the noise on input embeddings in training (NEFTune, arXiv 2310.05914). 0: none.",
    )


class DpoHyperparameters(Hyperparameters):
    """Direct preference optimization (arXiv 2305.18290)."""

    beta: Beta | Auto = Field(default="auto", description="How closely the base is held to. auto: 0.1.")
    loss_type: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid", description="ipo: the squared loss of arXiv 2310.12036, over means of log ratios."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Part of the pairs taken to be swapped; only with sigmoid."
    )

    @model_validator(mode="after")
    def _smoothing_is_of_the_sigmoid(self) -> DpoHyperparameters:
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError("ipo has no label_smoothing: leave it out, or use loss_type sigmoid")
        return self


class OrpoHyperparameters(Hyperparameters):
    """Odds ratio preference optimization (arXiv 2403.07691)."""

    beta: Beta | Auto = Field(default="auto", description="Weight of the odds ratio, the paper's lambda. auto: 0.1.")


class SimpoHyperparameters(Hyperparameters):
    """Simple preference optimization (arXiv 2405.14734)."""

    beta: Beta | Auto = Field(default="auto", description="Scale of the mean log probabilities. auto: 2.")
    gamma: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | Auto = Field(
        default="auto", description="Margin by which the preferred answer is to win. auto: half of beta."
    )


class KtoHyperparameters(Hyperparameters):
    """Kahneman-Tversky optimization (arXiv 2402.01306)."""

    batch_size: Annotated[int, Field(ge=2, le=1024)] | Auto = Field(
        default="auto", description="Answers per optimizer step: each is also put to another's prompt, so 2 at least."
    )
    beta: Beta | Auto = Field(default="auto", description="How closely the base is held to. auto: 0.1.")
    desirable_weight: Weight = Field(default=1.0, description="Of the loss of answers with the label true.")
    undesirable_weight: Weight = Field(default=1.0, description="Of the loss of answers with the label false.")


class SupervisedMethod(Strict):
    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class DpoMethod(Strict):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class OrpoMethod(Strict):
    hyperparameters: OrpoHyperparameters = OrpoHyperparameters()


class SimpoMethod(Strict):
    hyperparameters: SimpoHyperparameters = SimpoHyperparameters()


class KtoMethod(Strict):
    hyperparameters: KtoHyperparameters = KtoHyperparameters()


class Method(Strict):
    """A type, and its numbers under its own name."""

    type: MethodType = Field(
        default="supervised",
        description=(
            "supervised: train on answers. dpo, orpo, simpo: on pairs of answers. kto: on answers labeled as desirable "
            "or undesirable."
        ),
    )
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    orpo: OrpoMethod | None = None
    simpo: SimpoMethod | None = None
    kto: KtoMethod | None = None

    @model_validator(mode="after")
    def _numbers_are_of_the_type(self) -> Method:
        others = [name for name in get_args(MethodType) if name != self.type and getattr(self, name) is not None]
        if others:
            raise ValueError(f"its type is '{self.type}': say so with '{others[0]}', or leave '{others[0]}' out")
        return self

    def hyperparameters(self) -> Hyperparameters:
        """Those of its type: OpenAI's three and its own."""
        of_type: SupervisedMethod | DpoMethod | OrpoMethod | SimpoMethod | KtoMethod | None = getattr(self, self.type)
        return HYPERPARAMETERS[self.type]() if of_type is None else of_type.hyperparameters


HYPERPARAMETERS: dict[MethodType, type[Hyperparameters]] = {
    "supervised": SupervisedHyperparameters,
    "dpo": DpoHyperparameters,
    "orpo": OrpoHyperparameters,
    "simpo": SimpoHyperparameters,
    "kto": KtoHyperparameters,
}


class SupervisedSpec(Strict):
    """The numbers of learning from answers. The defaults are what records of before they could be asked for mean."""

    label_smoothing: float = 0.0
    neftune_alpha: float = 0.0


class PreferenceSpec(Strict):
    """The numbers of a loss that compares answers; those that its method lacks have the value that changes nothing."""

    beta: float
    gamma: float = 0.0
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def compares_with_start(method: str) -> bool:
    """Whether its loss compares with what the job begins with: the base, or the parent adapter on it."""
    return method in ("dpo", "kto")


def resolve_supervised(given: Hyperparameters) -> SupervisedSpec | None:
    """None where answers are compared. At their older place given are OpenAI's three alone."""
    match given:
        case SupervisedHyperparameters():
            return SupervisedSpec(**given.model_dump(include=set(SupervisedSpec.model_fields)))
        case DpoHyperparameters() | OrpoHyperparameters() | SimpoHyperparameters() | KtoHyperparameters():
            return None
        case _:
            return SupervisedSpec()


def resolve_preference(given: Hyperparameters) -> PreferenceSpec | None:
    """None where answers are learnt as they are."""
    match given:
        case DpoHyperparameters():
            beta = 0.1 if given.beta == "auto" else given.beta
            return PreferenceSpec(beta=beta, loss_type=given.loss_type, label_smoothing=given.label_smoothing)
        case OrpoHyperparameters():
            return PreferenceSpec(beta=0.1 if given.beta == "auto" else given.beta)
        case SimpoHyperparameters():
            beta = 2.0 if given.beta == "auto" else given.beta
            return PreferenceSpec(beta=beta, gamma=beta / 2 if given.gamma == "auto" else given.gamma)
        case KtoHyperparameters():
            weights = given.model_dump(include={"desirable_weight", "undesirable_weight"})
            return PreferenceSpec(beta=0.1 if given.beta == "auto" else given.beta, **weights)
        case _:
            return None


def compared_kind(method: MethodType) -> DataKind | None:
    """The kind of rows that it compares, which its files must hold and other methods' may not; None where answers are
    learnt as they are."""
    if method == "supervised":
        return None
    return "unpaired" if method == "kto" else "preference"


def method_object(method: MethodType, shared: Json, own: SupervisedSpec | PreferenceSpec) -> Json:
    """The method as the API shows it, resolved. `shared`: OpenAI's three hyperparameters. `own`: the method's own."""
    known = own.model_dump(include=set(HYPERPARAMETERS[method].model_fields))
    return {"type": method, method: {"hyperparameters": {**shared, **known}}}

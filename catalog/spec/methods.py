"""Training methods: answers (`supervised`), pairs of answers (`dpo`, `orpo`, `simpo`), or labeled answers (`kto`).

The format is OpenAI's: a type, and its hyperparameters under the name of the type. `resolve_method` replaces every
`auto` by a value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from catalog.datasets.formats import DataKind
from catalog.spec.model_fields import Auto, Strict
from catalog.spec.training import BASE_LEARNING_RATE, HIGHEST_RATE

PREFERENCE_MULTIPLIER = 0.1
"""`auto` learning_rate_multiplier of preference methods, for a learning rate of 2e-5. At the usual learning rate of
supervised training, a few steps of DPO make both answers unlikely."""

AUTO_EPOCHS = 3
Json = dict[str, Any]
MethodType = Literal["supervised", "dpo", "orpo", "simpo", "kto"]
Beta = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
OF_TYPE = "Options of the type with the name of this field. null: the defaults."
Weight = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


class Hyperparameters(Strict):
    """OpenAI's three hyperparameters."""

    batch_size: Annotated[int, Field(ge=1, le=1024)] | Auto = Field(
        default="auto",
        description="Rows per optimizer step. auto: about 0.5% of the rows, as a power of two from 4 to 32.",
    )
    learning_rate_multiplier: (
        Annotated[float, Field(gt=0, le=HIGHEST_RATE / BASE_LEARNING_RATE, allow_inf_nan=False)] | Auto
    ) = Field(
        default="auto",
        description=f"Factor on the default rate. auto: 1, or {PREFERENCE_MULTIPLIER} if not supervised.",
    )
    n_epochs: Annotated[int, Field(ge=1, le=100)] | Auto = Field(
        default="auto", description=f"Passes over the training file. auto: {AUTO_EPOCHS}."
    )


class SupervisedOptions(Strict):
    """Cross-entropy loss of the answers."""

    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Fraction of the label probability that is spread over the vocabulary. Training loss only.",
    )
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="NEFTune noise scale on input embeddings in training (arXiv 2310.05914). 0: off.",
    )


class SupervisedHyperparameters(SupervisedOptions, Hyperparameters):
    """Hyperparameters of the method supervised."""


class DpoHyperparameters(Hyperparameters):
    """Direct preference optimization (arXiv 2305.18290)."""

    beta: Beta | Auto = Field(
        default="auto", description="Strength of the penalty for differing from the reference model. auto: 0.1."
    )
    loss_type: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid",
        description=(
            "Loss of the margin: sigmoid, or ipo for the squared loss of the mean log ratios (arXiv 2310.12036)."
        ),
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Assumed fraction of mislabeled pairs (sigmoid only)."
    )

    @model_validator(mode="after")
    def _smoothing_is_of_the_sigmoid(self) -> DpoHyperparameters:
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError("ipo has no label_smoothing: remove it, or set loss_type to sigmoid")
        return self


class OrpoHyperparameters(Hyperparameters):
    """Odds ratio preference optimization (arXiv 2403.07691)."""

    beta: Beta | Auto = Field(
        default="auto", description="Weight of the odds ratio loss (lambda in the paper). auto: 0.1."
    )


class SimpoHyperparameters(Hyperparameters):
    """Simple preference optimization (arXiv 2405.14734)."""

    beta: Beta | Auto = Field(default="auto", description="Scale of the mean log probabilities. auto: 2.")
    gamma: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | Auto = Field(
        default="auto", description="Target margin between the two answers. auto: half of beta."
    )


class KtoHyperparameters(Hyperparameters):
    """Kahneman-Tversky optimization (arXiv 2402.01306)."""

    batch_size: Annotated[int, Field(ge=2, le=1024)] | Auto = Field(
        default="auto",
        description=(
            "Answers per optimizer step, at least 2 because each is also paired with the prompt of another. auto: "
            "about 0.5% of the rows, as a power of two from 4 to 32."
        ),
    )
    beta: Beta | Auto = Field(
        default="auto", description="Strength of the penalty for differing from the reference model. auto: 0.1."
    )
    desirable_weight: Weight = Field(default=1.0, description="Loss weight of answers with the label true.")
    undesirable_weight: Weight = Field(default=1.0, description="Loss weight of answers with the label false.")


class SupervisedMethod(Strict):
    """Hyperparameters of the method supervised."""

    hyperparameters: SupervisedHyperparameters = SupervisedHyperparameters()


class DpoMethod(Strict):
    """Hyperparameters of the method dpo."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class OrpoMethod(Strict):
    """Hyperparameters of the method orpo."""

    hyperparameters: OrpoHyperparameters = OrpoHyperparameters()


class SimpoMethod(Strict):
    """Hyperparameters of the method simpo."""

    hyperparameters: SimpoHyperparameters = SimpoHyperparameters()


class KtoMethod(Strict):
    """Hyperparameters of the method kto."""

    hyperparameters: KtoHyperparameters = KtoHyperparameters()


class Method(Strict):
    """A method type, and its hyperparameters under the name of the type."""

    type: MethodType = Field(
        default="supervised",
        description=(
            "Training method: supervised (on answers), dpo, orpo or simpo (on pairs of answers), or kto (on answers "
            "labeled as desirable or undesirable)."
        ),
    )
    supervised: SupervisedMethod | None = Field(default=None, description=OF_TYPE)
    dpo: DpoMethod | None = Field(default=None, description=OF_TYPE)
    orpo: OrpoMethod | None = Field(default=None, description=OF_TYPE)
    simpo: SimpoMethod | None = Field(default=None, description=OF_TYPE)
    kto: KtoMethod | None = Field(default=None, description=OF_TYPE)

    @model_validator(mode="after")
    def _numbers_are_of_the_type(self) -> Method:
        others = [name for name in get_args(MethodType) if name != self.type and getattr(self, name) is not None]
        if others:
            raise ValueError(f"its type is '{self.type}': set the type to '{others[0]}', or remove '{others[0]}'")
        return self

    def hyperparameters(self) -> Hyperparameters:
        """Return the hyperparameters of its type: OpenAI's three and the method's own."""
        of_type: SupervisedMethod | DpoMethod | OrpoMethod | SimpoMethod | KtoMethod | None = getattr(self, self.type)
        return HYPERPARAMETERS[self.type]() if of_type is None else of_type.hyperparameters


HYPERPARAMETERS: dict[MethodType, type[Hyperparameters]] = {
    "supervised": SupervisedHyperparameters,
    "dpo": DpoHyperparameters,
    "orpo": OrpoHyperparameters,
    "simpo": SimpoHyperparameters,
    "kto": KtoHyperparameters,
}


class PreferenceOptions(Strict):
    """Hyperparameters of a preference loss. A field that the method lacks has a value without effect."""

    beta: float
    gamma: float = 0.0
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def compares_with_start(method: str) -> bool:
    """Return whether the loss compares with a reference model: the base model, with the parent adapter if any."""
    return method in ("dpo", "kto")


def resolve_method(given: Hyperparameters) -> SupervisedOptions | PreferenceOptions:
    """Return the hyperparameters that only the method has.

    The deprecated top-level field contains only OpenAI's three hyperparameters, of the method supervised.
    """
    match given:
        case SupervisedHyperparameters():
            return SupervisedOptions(**given.model_dump(include=set(SupervisedOptions.model_fields)))
        case DpoHyperparameters():
            beta = 0.1 if given.beta == "auto" else given.beta
            return PreferenceOptions(beta=beta, loss_type=given.loss_type, label_smoothing=given.label_smoothing)
        case OrpoHyperparameters():
            return PreferenceOptions(beta=0.1 if given.beta == "auto" else given.beta)
        case SimpoHyperparameters():
            beta = 2.0 if given.beta == "auto" else given.beta
            return PreferenceOptions(beta=beta, gamma=beta / 2 if given.gamma == "auto" else given.gamma)
        case KtoHyperparameters():
            weights = given.model_dump(include={"desirable_weight", "undesirable_weight"})
            return PreferenceOptions(beta=0.1 if given.beta == "auto" else given.beta, **weights)
        case _:
            return SupervisedOptions()


def compared_kind(method: MethodType) -> DataKind | None:
    """Return the kind of rows that a preference method requires, and that other methods reject.

    None for the method supervised.
    """
    if method == "supervised":
        return None
    return "unpaired" if method == "kto" else "preference"


def method_object(method: MethodType, shared: Json, own: SupervisedOptions | PreferenceOptions) -> Json:
    """Return the resolved method as the API shows it. `shared`: OpenAI's three hyperparameters. `own`: the method's."""
    known = own.model_dump(include=set(HYPERPARAMETERS[method].model_fields))
    return {"type": method, method: {"hyperparameters": {**shared, **known}}}

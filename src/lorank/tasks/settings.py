"""What a user can choose about a task: which data set, which columns, how much of it, how long a sequence.

Immutable and checked when made: an unknown key or a value out of range raises pydantic's ValidationError, which lists
everything that is wrong. `lorank.config.settings` reads these from YAML; in Python they are made by keyword.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from lorank.tasks import template
from lorank.tasks.known import KNOWN


class Settings(BaseModel):
    """Base of every settings class: immutable, unknown keys refused, described by docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Template = Annotated[str, AfterValidator(template.checked)]


class DataSettings(Settings):
    """Where rows come from and which of them are used; common to all tasks."""

    data: str = Field(min_length=1)
    """A name lorank knows (rotten_tomatoes, clinc150, e2e_nlg, python_reference), a folder in LORANK_DATA, a data set
    on the Hugging Face hub (owner/name), or the path of a file or folder (.jsonl, .csv, .txt, each also with .gz)."""
    subset: str | None = None
    """The configuration of a hub data set that has several."""
    train_split: str = "train"
    """The split to train on."""
    validation_split: str | None = "validation"
    """The split for evaluation during training, for scoring ranks and for choosing the best checkpoint."""
    holdout: float | None = Field(default=None, gt=0, lt=1)
    """Instead of a validation split: this fraction of the training split is held out. Rows with the same prompt
    (generation) stay on one side."""
    test_split: str | None = "test"
    """The split for the final report and for nothing else; null where there is none."""
    max_train: int | None = Field(default=None, ge=1)
    """Use at most this many training examples, drawn with `seed`."""
    max_eval: int | None = Field(default=None, ge=1)
    """Use at most this many validation examples, and as many test examples; for generation, this many prompts with all
    their references."""
    seed: int = 0
    """Decides which rows are held out and drawn, apart from the training seed: seeds can differ on equal data."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = KNOWN.get(given["data"]) if isinstance(given.get("data"), str) else None
        defaults = {key: value for key, value in known.defaults.items() if key in cls.model_fields} if known else {}
        # a validation split and a held-out part exclude each other: naming one replaces the other's default
        if given.get("holdout") is not None:
            defaults["validation_split"] = None
        elif given.get("validation_split") is not None:
            defaults["holdout"] = None
        return {**defaults, **given}

    @model_validator(mode="after")
    def _one_source_of_validation(self) -> Self:
        if (self.validation_split is None) == (self.holdout is None):
            raise ValueError(
                f"validation_split is {self.validation_split!r} and holdout is {self.holdout!r}: name either a "
                "validation split or the fraction of the training split to hold out"
            )
        if self.train_split == self.validation_split:
            raise ValueError(f"train_split and validation_split are both {self.train_split!r}: hold a part out instead")
        if self.test_split == self.train_split:
            raise ValueError(f"train_split and test_split are both {self.train_split!r}: name two splits")
        return self


class ClassificationSettings(DataSettings):
    """Text in, one of several labels out; reported as accuracy (0 to 1)."""

    name: Literal["classification"] = "classification"
    template: Template = "{text}"
    """The text to classify, with column names in braces."""
    second: Template | None = None
    """For pairs of sentences: the second text, with column names in braces."""
    label: str = "label"
    """The column of the label: whole numbers or strings."""
    max_length: int = Field(default=128, ge=2)
    """Longest input in tokens; what is longer is cut at the end."""


class GenerationSettings(DataSettings):
    """A prompt in, a text out; loss on the target alone, reported as BLEU and ROUGE-L (0 to 100)."""

    name: Literal["generation"] = "generation"
    prompt: Template
    """The prompt, with column names in braces."""
    target: Template
    """The text to be generated, with column names in braces."""
    max_length: int = Field(default=192, ge=4)
    """Longest prompt and target together in tokens; a prompt that does not fit is cut at its beginning."""
    max_new_tokens: int = Field(default=80, ge=1)
    """Longest text generated, in tokens."""
    num_beams: int = Field(default=1, ge=1)
    """1 is greedy decoding; more is beam search, as many times slower."""


class LanguageModellingSettings(DataSettings):
    """Plain text in blocks of equal length; reported as loss per token and perplexity."""

    name: Literal["language_modelling"] = "language_modelling"
    template: Template = "{text}"
    """The text, with column names in braces."""
    block_size: int = Field(default=256, ge=8)
    """Tokens per block; texts are joined by the end-of-text token and cut into blocks, a rest is dropped."""


TaskSettings = Annotated[
    ClassificationSettings | GenerationSettings | LanguageModellingSettings, Field(discriminator="name")
]

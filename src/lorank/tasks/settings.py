"""Settings of a task: the data set, its columns, the number of examples, the length of a sequence.

Settings are immutable and checked when they are made. An unknown key or a value out of range raises pydantic's
ValidationError, which lists all errors. `lorank.config.settings` reads them from YAML; in Python, give keywords.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from lorank.tasks import template
from lorank.tasks.known import KNOWN


class Settings(BaseModel):
    """Base of every settings class: immutable, unknown keys are errors, docstrings become descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Template = Annotated[str, AfterValidator(template.checked)]


class DataSettings(Settings):
    """The source of the rows and the rows to use; the same for all tasks."""

    data: str = Field(min_length=1)
    """A known name (rotten_tomatoes, clinc150, banking77, e2e_nlg, gsm8k, python_reference, classics, facts), a folder
    in LORANK_DATA, a data set on the Hugging Face hub (owner/name), or the path of a file or folder (.jsonl, .csv,
    .txt, each also with .gz)."""
    subset: str | None = Field(default=None, coerce_numbers_to_str=True)
    """The configuration name of a hub data set that has several configurations; the number of `facts`."""
    train_split: str = "train"
    """The split to train on."""
    validation_split: str | None = "validation"
    """The split for evaluation during training, for scoring ranks and for choosing the best checkpoint."""
    holdout: float | None = Field(default=None, gt=0, lt=1)
    """Instead of a validation split: the fraction of the training split to hold out. Rows with the same prompt
    (generation) stay together."""
    test_split: str | None = "test"
    """The split for the final report only; null: no test split."""
    max_train: int | None = Field(default=None, ge=1)
    """Use at most this many training examples, drawn with `seed`."""
    max_eval: int | None = Field(default=None, ge=1)
    """Use at most this many validation examples, and as many test examples; for generation, this many prompts with all
    their references."""
    seed: int = 0
    """Seed for holding out and drawing rows, and of permute_words. It is separate from the training seed, which may
    differ on equal data."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = KNOWN.get(given["data"]) if isinstance(given.get("data"), str) else None
        defaults = {key: value for key, value in known.defaults.items() if key in cls.model_fields} if known else {}
        # a validation split and a held-out part exclude each other: setting one removes the other's default
        if given.get("holdout") is not None:
            defaults["validation_split"] = None
        elif given.get("validation_split") is not None:
            defaults["holdout"] = None
        return {**defaults, **given}

    @model_validator(mode="after")
    def _one_source_of_validation(self) -> Self:
        if (self.validation_split is None) == (self.holdout is None):
            raise ValueError(
                f"validation_split is {self.validation_split!r} and holdout is {self.holdout!r}: give either a "
                "validation split or the fraction of the training split to hold out"
            )
        if self.train_split == self.validation_split:
            raise ValueError(f"train_split and validation_split are both {self.train_split!r}: hold a part out instead")
        if self.test_split == self.train_split:
            raise ValueError(f"train_split and test_split are both {self.train_split!r}: name two splits")
        return self


class ClassificationSettings(DataSettings):
    """Text classification: one of several labels per text. Metric: accuracy (0 to 1)."""

    name: Literal["classification"] = "classification"
    template: Template = "{text}"
    """The text to classify, with column names in braces."""
    second: Template | None = None
    """The second text of a pair of sentences, with column names in braces; null: one text per row."""
    label: str = "label"
    """The column of the label: whole numbers or strings."""
    max_length: int = Field(default=128, ge=2)
    """Longest input in tokens; a longer input is cut at its end."""


class GenerationSettings(DataSettings):
    """Text generation from a prompt; loss on the target only. Metrics: BLEU and ROUGE-L (0 to 100)."""

    name: Literal["generation"] = "generation"
    prompt: Template
    """The prompt, with column names in braces."""
    target: Template
    """The text to generate, with column names in braces."""
    max_length: int = Field(default=192, ge=4)
    """Longest prompt plus target in tokens; a prompt that is too long is cut at its beginning."""
    max_new_tokens: int = Field(default=80, ge=1)
    """Longest text generated, in tokens."""
    num_beams: int = Field(default=1, ge=1)
    """1: greedy decoding; more: beam search, slower by this factor."""


class LanguageModellingSettings(DataSettings):
    """Language modelling on plain text, in blocks of equal length. Metrics: loss per token and perplexity."""

    name: Literal["language_modelling"] = "language_modelling"
    template: Template = "{text}"
    """The text, with column names in braces."""
    block_size: int = Field(default=256, ge=8)
    """Tokens per block. Texts are joined by the end-of-text token and cut into blocks; the incomplete last block is
    dropped."""
    permute_words: int | None = Field(default=None, ge=2)
    """Exchange so many of the training text's most frequent words among each other, in all splits alike, by a random
    permutation drawn with `seed`; null: leave the text as it is."""


class ImageClassificationSettings(DataSettings):
    """Image classification on scikit-learn's digits; other images are not read. Metric: accuracy (0 to 1)."""

    name: Literal["image_classification"] = "image_classification"
    data: Literal["digits"]
    """digits: 1,797 handwritten digits of 8 × 8 pixels, part of scikit-learn, in a fixed random split into train (997),
    validation (400) and test (400)."""
    subset: None = None
    """The digits have no subsets: null."""
    image_size: int = Field(default=8, ge=1)
    """Pixels of a side of the model's images; the digits are resized to it."""
    channels: Literal[1, 3] = 1
    """Channels of the model's images; the digits' one channel is repeated."""
    scramble: float = Field(default=0.0, ge=0, le=1)
    """The share of the pixels that exchange their places, by one permutation for all images. The larger it is, the less
    a pretrained model's features fit, and the more an adapter has to learn."""


TaskSettings = Annotated[
    ClassificationSettings | GenerationSettings | LanguageModellingSettings | ImageClassificationSettings,
    Field(discriminator="name"),
]

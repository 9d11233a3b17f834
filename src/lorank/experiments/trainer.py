"""The Trainer of a run: transformers', where it differs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer

from lorank.experiments.errors import SettingsError
from lorank.lora import make_lora_plus_optimizer


class RunTrainer(Trainer):
    """Takes no further step if it resumes from the run's last checkpoint; reads every model's checkpoints; has LoRA+,
    and a learning rate for heads.

    transformers' Trainer would take one step more. Of a whole model, it reads the weights by their names in memory, and
    leaves out those that are not in the file. A vision transformer's file has other names.

    Args:
        lora_plus: the learning rate of B as a multiple of A's; None: the same.
        head_lr: the learning rate of what is trained in full beside the adapter; None: the same.
        arguments: those of the Trainer.
    """

    def __init__(self, *, lora_plus: float | None = None, head_lr: float | None = None, **arguments: Any) -> None:
        self._lora_plus, self._head_lr = lora_plus, head_lr
        super().__init__(**arguments)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return super().create_optimizer(model)
        adapted: Any = self.model if model is None else model
        if self._lora_plus is None:
            made: torch.optim.Optimizer = super().create_optimizer(model)
        else:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, adapted)
            made = make_lora_plus_optimizer(
                adapted, kind, ratio=self._lora_plus, weight_decay=self.args.weight_decay, **settings
            )
        if self._head_lr is not None:
            give_heads_lr_(made, adapted, self._head_lr)
        self.optimizer = made
        return made

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        stopped_early = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if stopped_early or self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _load_best_model(self) -> None:
        if not self._load_whole_model(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_whole_model(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_whole_model(self, checkpoint: str) -> bool:
        """Loads the weights of full fine-tuning in one process. Returns whether this is such a run."""
        model = self.model
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())
        return True


def give_heads_lr_(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float) -> None:
    """Gives what is trained in full beside the adapter param groups of its own, with this learning rate.

    Raises:
        SettingsError: there is nothing of the kind.
    """
    heads = {id(p) for name, p in model.named_parameters() if ".modules_to_save." in name and p.requires_grad}
    if not heads:
        raise SettingsError(
            f"training.head_lr is {lr:g}, but nothing is trained in full beside the adapter: leave it out, or name "
            "modules in lora.modules_to_save"
        )
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in heads]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in heads]
            optimizer.add_param_group({**group, "params": own, "lr": lr})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

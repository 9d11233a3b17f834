"""Modules that move without gradients while a model trains, such as BatchNorm. No file of an adapter holds them."""

from __future__ import annotations

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def moving_statistics(model: nn.Module) -> list[str]:
    """The names of normalisations that change their running mean and variance in the model's present mode.

    Those that an adapter saves as a whole (``modules_to_save``) are left out.
    """
    found: list[str] = []
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if isinstance(module, AuxiliaryTrainingWrapper):
            continue
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None and _moves(module):
            found.append(name)
        waiting += [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
    return sorted(found)


def _moves(module: _NormBase) -> bool:
    return module.track_running_stats and module.momentum != 0  # None: the mean over all batches

"""Support for ``torch.compile``: the model is recompiled after every change of ranks.

A compiled graph is valid for fixed shapes. After eight sets of shapes (``recompile_limit``), PyTorch would run the
model uncompiled for the rest of the run, with only a line in the log. So all compiled code is discarded when ranks
change, and PyTorch's count starts again from zero.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from lorank.errors import LorankError
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")


class TorchCompile(Integration):
    """Recompiles a run's model after every change of ranks.

    Args:
        compiled: whether the model is compiled, or will be.

    Attributes:
        resets: how often the compiled code was discarded.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self._ranks: Mapping[str, int] = {}
        self.resets = 0

    def on_start(self, run: RunState) -> None:
        """Raises LorankError for a LoRA per head, which breaks the graph in every layer."""
        if not self._compiled:
            return
        if run.allocator.heads_of(run.layers):
            raise LorankError(
                "a LoRA per head uses a separate autograd function in every layer, at which torch.compile would break "
                "its graph. Train without torch.compile, or keep one rank per module with heads='module'"
            )
        self._ranks = run.layers.ranks
        logger.info("torch.compile: the model is recompiled after every allocation that changes ranks")

    def after_resize(self, run: RunState) -> None:
        """Discards all compiled code of the process if ranks have changed."""
        if not self._compiled or run.layers.ranks == self._ranks:
            return
        self._ranks = run.layers.ranks
        self.resets += 1
        torch.compiler.reset()

    def on_end(self, run: RunState) -> None:
        if self.resets:
            logger.info("torch.compile: ranks changed %d times, and the model was recompiled each time", self.resets)
            self.resets = 0

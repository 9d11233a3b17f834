"""``torch.compile``: every change of ranks compiles the model anew, and never falls back to eager unnoticed.

A compiled graph holds the shapes that it was made for. After eight sets of shapes (``recompile_limit``) PyTorch would
run the model uncompiled for the rest of the run, with a line in the log. So what has been compiled is thrown away when
ranks move, and the count begins anew.
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
    """A run's compiled model.

    Args:
        compiled: whether the model is compiled, or will be.

    Attributes:
        resets: how often what was compiled has been thrown away.
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
                "a LoRA per head is a function of its own in every layer, where torch.compile would break its graph. "
                "Train without torch.compile, or keep one rank per module with heads='module'"
            )
        self._ranks = run.layers.ranks
        logger.info("torch.compile: the model is compiled anew after every allocation that moves ranks")

    def after_resize(self, run: RunState) -> None:
        """If ranks have moved, what was compiled for the old ones is thrown away, of the whole process."""
        if not self._compiled or run.layers.ranks == self._ranks:
            return
        self._ranks = run.layers.ranks
        self.resets += 1
        torch.compiler.reset()

    def on_end(self, run: RunState) -> None:
        if self.resets:
            logger.info("torch.compile: ranks moved %d times, and the model was compiled anew each time", self.resets)
            self.resets = 0

"""``torch.compile``: every change of ranks compiles the model anew, and never falls back to eager unnoticed.

A compiled graph holds the shapes that it was made for. After eight sets of shapes (``recompile_limit``) PyTorch would
run the model uncompiled for the rest of the run, with a line in the log. So what has been compiled is thrown away when
ranks move, and the count begins anew.
"""

from __future__ import annotations

import logging

import torch

from lorank.errors import LorankError
from lorank.lora import AdapterLayers

logger = logging.getLogger("lorank")


class Compiling:
    """A run's compiled model.

    Args:
        layers: the LoRA layers.
        compiled: whether the model is compiled, or will be.
        per_head: whether layers will have a LoRA per head.

    Attributes:
        resets: how often what was compiled has been thrown away.

    Raises:
        LorankError: a LoRA per head in a compiled model, where it breaks the graph in every layer.
    """

    def __init__(self, layers: AdapterLayers, compiled: bool, *, per_head: bool) -> None:
        self._layers, self._compiled = layers, compiled
        self._shapes = layers.ranks
        self.resets = 0
        if compiled and per_head:
            raise LorankError(
                "a LoRA per head is a function of its own in every layer, where torch.compile would break its graph. "
                "Train without torch.compile, or keep one rank per module with heads='module'"
            )
        if compiled:
            logger.info("torch.compile: the model is compiled anew after every allocation that moves ranks")

    def follow(self) -> None:
        """Ranks may have moved: if so, what was compiled for the old ones is thrown away, of the whole process."""
        if not self._compiled or self._layers.ranks == self._shapes:
            return
        self._shapes = self._layers.ranks
        self.resets += 1
        torch.compiler.reset()

    def end(self) -> None:
        """Says how often."""
        if self.resets:
            logger.info("torch.compile: ranks moved %d times, and the model was compiled anew each time", self.resets)
            self.resets = 0

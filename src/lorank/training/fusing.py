"""While a run lasts, its layers compute by the fused forward (:func:`lorank.lora.fuse_`)."""

from __future__ import annotations

from torch import nn

from lorank.lora import AdapterLayers, fuse_, is_compiled, unfuse_


class Fusing:
    """A run's wish, and its layers.

    Args:
        outer: the model as the loop calls it, where that is known.
        wanted: whether layers are to be fused at all.
        compiled: whether the model will be compiled; seen by itself where it has been.
    """

    def __init__(self, layers: AdapterLayers, outer: nn.Module, *, wanted: bool, compiled: bool) -> None:
        self._layers, self._wanted = layers, wanted
        self._compiled = compiled or is_compiled(outer)

    def follow(self, finished: bool) -> None:
        """The run begins, or goes on from what was loaded."""
        if self._wanted and not finished:
            fuse_(self._layers, compiled=self._compiled)
        else:
            self.end()

    def end(self) -> None:
        """The layers are stock PEFT again."""
        unfuse_(self._layers)

"""While a run lasts, its layers compute by the fused forward (:func:`lorank.lora.fuse_`)."""

from __future__ import annotations

from lorank.lora import AdapterLayers, fuse_, unfuse_


class Fusing:
    """A run's wish, and its layers.

    Args:
        wanted: whether layers are to be fused at all.
        compiled: whether the model is compiled, or will be: it fuses by itself then.
    """

    def __init__(self, layers: AdapterLayers, *, wanted: bool, compiled: bool) -> None:
        self._layers, self._wanted = layers, wanted
        self._compiled = compiled

    def follow(self, finished: bool) -> None:
        """The run begins, or goes on from what was loaded."""
        if self._wanted and not finished:
            fuse_(self._layers, compiled=self._compiled)
        else:
            self.end()

    def end(self) -> None:
        """The layers are stock PEFT again."""
        unfuse_(self._layers)

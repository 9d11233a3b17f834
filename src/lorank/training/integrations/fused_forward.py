"""While a run lasts, its layers compute by the fused forward (:func:`lorank.lora.fuse_`)."""

from __future__ import annotations

from lorank.lora import fuse_, unfuse_
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState


class FusedForward(Integration):
    """Layers are fused after every change of their form (a layer that is fused already stays as it is).

    Args:
        wanted: whether layers are to be fused at all.
        compiled: whether the model is compiled, or will be: ``torch.compile`` fuses by itself.
    """

    def __init__(self, *, wanted: bool, compiled: bool) -> None:
        self._wanted, self._compiled = wanted, compiled
        self._reported: dict[str, list[str]] = {}

    def after_resize(self, run: RunState) -> None:
        if run.finished or not self._wanted:
            unfuse_(run.layers)
            return
        self._reported = fuse_(run.layers, compiled=self._compiled, already_logged=self._reported)

    def on_end(self, run: RunState) -> None:
        unfuse_(run.layers)

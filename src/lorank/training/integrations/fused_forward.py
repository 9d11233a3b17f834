"""Uses the fused forward (:func:`lorank.lora.fuse_`) in all supported layers during a run."""

from __future__ import annotations

from lorank.lora import fuse_, unfuse_
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState


class FusedForward(Integration):
    """Fuses the layers after every change of their form, and restores PEFT's forward at the end.

    Args:
        enabled: whether layers are fused at all.
        compiled: whether the model is compiled, or will be. Then nothing is fused, because ``torch.compile`` does it.
    """

    def __init__(self, *, enabled: bool, compiled: bool) -> None:
        self._enabled, self._compiled = enabled, compiled
        self._logged: dict[str, list[str]] = {}

    def after_resize(self, run: RunState) -> None:
        if run.finished or not self._enabled:
            unfuse_(run.layers)
            return
        self._logged = fuse_(run.layers, compiled=self._compiled, already_logged=self._logged)

    def on_end(self, run: RunState) -> None:
        unfuse_(run.layers)

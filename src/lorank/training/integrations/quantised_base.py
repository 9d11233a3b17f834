"""Keeps a quantised base model trainable during a run, also after an evaluation (:mod:`lorank.lora.quantised`)."""

from __future__ import annotations

from lorank.lora import RepackingPrevention, prevent_repacking
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState


class QuantisedBase(Integration):
    """Prevents bitsandbytes from repacking 4-bit weights, and refuses a merge that would lose the adapter."""

    def __init__(self) -> None:
        self._prevention: RepackingPrevention | None = None

    def on_start(self, run: RunState) -> None:
        self._prevention = prevent_repacking(run.trained_model)

    def on_end(self, run: RunState) -> None:
        if self._prevention is not None:
            self._prevention.remove()

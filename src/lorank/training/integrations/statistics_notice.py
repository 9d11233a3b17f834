"""Warns once of running statistics of the base model that move in training, because no adapter's file holds them."""

from __future__ import annotations

import logging

from lorank.lora.running_statistics import moving_statistics
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")


class StatisticsNotice(Integration):
    """Logs one warning after the first step, when the loop has put the model into training mode."""

    def on_start(self, run: RunState) -> None:
        self._checked = False

    def after_step(self, run: RunState) -> None:
        if self._checked:
            return
        self._checked = True
        names = moving_statistics(run.model)
        if names:
            logger.warning(
                "%d modules of the base model (%s%s) change their running statistics while it trains. An adapter's "
                "file does not hold them, so the adapter computes something else where it is loaded. Keep them as they "
                "are: call .eval() on these modules after every model.train(), or set their momentum to 0; or train "
                "and save them with modules_to_save",
                len(names),
                ", ".join(names[:3]),
                ", …" if len(names) > 3 else "",
            )

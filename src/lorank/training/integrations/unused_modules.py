"""Warns once about adapted modules that never have a gradient: their ranks take budget, and nothing trains them.

``target_modules="all-linear"`` finds such modules in many models: the last layer of a vision tower whose earlier layer
is read, BERT's pooler under another head, a projection of a state space whose weight is read without a call.
"""

from __future__ import annotations

import logging

from lorank.training.integrations.base import Integration
from lorank.training.parallel.deepspeed import ZeroOptimizer
from lorank.training.parallel.process_group import is_first_process
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")

STEPS = 10
"""So many steps are watched. An expert, or another module that runs sometimes, may have no gradient in the first."""
SHOWN = 3


class UnusedModules(Integration):
    """Watches the first steps of a run whose method moves ranks. Where no module shows a gradient, it says nothing."""

    def on_start(self, run: RunState) -> None:
        watched = run.allocator.moves_ranks and not isinstance(run.optimizer, ZeroOptimizer)  # ZeRO hides gradients
        self._left = min(STEPS, run.info.total_steps - run.step) if watched else 0
        self._without = dict.fromkeys(run.layers)  # in order

    def before_step(self, run: RunState) -> None:
        if self._left <= 0:
            return
        self._left -= 1
        for name in list(self._without):
            layer = run.layers[name]
            trained = [weight for weight in layer.stored if weight.requires_grad]
            if not layer.rank or not trained or any(weight.grad is not None for weight in trained):
                del self._without[name]
        if self._left or not self._without or len(self._without) == len(run.layers) or not is_first_process():
            return
        shown = ", ".join(list(self._without)[:SHOWN]) + (", …" if len(self._without) > SHOWN else "")
        logger.warning(
            "%d of %d adapted modules have had no gradient until step %d (%s): the loss does not depend on them, so "
            "their ranks take budget and are never trained. Leave these modules out of target_modules",
            len(self._without),
            len(run.layers),
            run.step + 1,
            shown,
        )

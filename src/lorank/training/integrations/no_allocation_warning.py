"""Warns once about a run without any allocation: before the start, if the schedule shows it, or else at the end."""

from __future__ import annotations

import logging
import math
import weakref

from lorank.allocators import Allocator
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")


class NoAllocationWarning(Integration):
    """Logs one warning: at the start, or when the run has made its last step, is detached, or is garbage-collected."""

    def on_start(self, run: RunState) -> None:
        self._name = type(run.allocator).__name__
        self._moves_ranks = run.allocator.moves_ranks
        self._started = self._allocated = self._warned = False
        self._first_allocation = next(iter(run.allocator.schedule(run.info)), math.inf)
        self._total_steps = run.info.total_steps
        # The finalizer must not reference the run, which would never be collected otherwise.
        weakref.finalize(run, self._warn)
        # A method with a last decision moves ranks after the last step, and warns itself if it will not.
        decides_at_end = type(run.allocator).finish is not Allocator.finish
        if self._moves_ranks and self._first_allocation == math.inf and not decides_at_end:
            self._warned = True
            logger.warning(
                "%s will not move a single rank while it trains: its first allocation would come at or after the last "
                "of %d steps. Train longer, or change its settings so that it allocates earlier.",
                self._name,
                self._total_steps,
            )

    def after_allocation(self, run: RunState) -> None:
        self._started = True  # called once before the first step, so there is no warning about a run that cannot begin

    def after_resize(self, run: RunState) -> None:
        self._allocated = run.allocations > 0  # also if a resumed run had an allocation before

    def after_step(self, run: RunState) -> None:
        self._allocated = run.allocations > 0
        if run.step == self._total_steps:
            self._warn()

    def on_end(self, run: RunState) -> None:
        self._warn()

    def _warn(self) -> None:
        if not self._started or self._warned or self._allocated or not self._moves_ranks:
            return
        self._warned = True
        due = (
            f"the last decision was due after step {self._total_steps}"
            if self._first_allocation == math.inf
            else f"the first was due after step {self._first_allocation} of {self._total_steps}"
        )
        logger.warning(
            "%s ended without a single allocation: %s, and training stopped before it or the optimiser never stepped. "
            "No rank was changed.",
            self._name,
            due,
        )

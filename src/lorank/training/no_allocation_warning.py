"""A run in which nothing was ever allocated says so at its end, and why."""

from __future__ import annotations

import logging
import math

from lorank.allocators import Allocator, TrainingInfo

logger = logging.getLogger("lorank")


class NoAllocationWarning:
    """Says once, at the end of a run, that nothing was ever allocated, and why. Apart from Ranks, which may be gone."""

    def __init__(self, allocator: Allocator, run: TrainingInfo) -> None:
        self.name = type(allocator).__name__
        self.moves_ranks = allocator.moves_ranks
        self.allocations = 0
        self.first = next(iter(allocator.schedule(run)), math.inf)
        self.total_steps = run.total_steps
        if self.moves_ranks and self.first == math.inf:
            logger.warning(
                "%s will not move a single rank: its first allocation would come at or after the last of %d steps. "
                "Train longer, or allocate earlier (ALoRA: a smaller k1).",
                self.name,
                run.total_steps,
            )

    def tell(self) -> None:
        if self.moves_ranks and not self.allocations:
            why = (
                f"none was due in {self.total_steps} steps"
                if self.first == math.inf
                else f"the first was due after step {self.first} of {self.total_steps}, and training stopped before it "
                "or the optimiser never stepped"
            )
            logger.warning("%s ended without a single allocation: %s. No rank ever moved.", self.name, why)

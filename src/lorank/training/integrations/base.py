"""One protocol for whatever accompanies a run: processes, gradient scalers, ``torch.compile``, the fused forward, …

A run notifies its integrations in the order of their list. All of them are started inside an exit stack: if one cannot
start, or the run cannot begin, those that have started are ended in reverse order, and the model is as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from lorank.allocators import Allocation
from lorank.training.run_state import RunState


class Integration:
    """Something that accompanies a run. Every hook does nothing unless it is overridden; they run in this order.

        on_start → [before_step → the optimiser's step → (before_read → on_decision → after_resize → after_allocation)
        → after_step] for every step → on_end

    What stands in round brackets happens in steps in which ranks are allocated. A backend for distributed training is
    an integration too (:mod:`lorank.training.parallel.backend`).
    """

    def on_start(self, run: RunState) -> None:
        """The run begins, or goes on from a checkpoint. No rank has moved yet.

        Raises:
            LorankError: the run cannot be accompanied. Nothing may have changed then.
        """

    def before_step(self, run: RunState) -> None:
        """Gradients are there, weights have not moved; the method looks at the gradients after this.

        Raises:
            StepSkipped: the optimiser will not take this step.
        """

    def before_read(self, run: RunState) -> None:
        """The adapter's weights and their moments are about to be read, and perhaps resized."""

    def on_decision(self, run: RunState, allocation: Allocation | None) -> None:
        """The method has decided; no rank has moved yet. None: everything stays as it is."""

    def after_resize(self, run: RunState) -> None:
        """Shapes may have changed, by an allocation or because weights were loaded."""

    def after_allocation(self, run: RunState) -> None:
        """An allocation has been carried out, whether or not ranks moved, and the method has taken note of it."""

    def after_step(self, run: RunState) -> None:
        """The step is done, with everything that was due, or was skipped."""

    def on_end(self, run: RunState) -> None:
        """The run ends, or could not begin: whatever this integration put on the model or the optimiser is removed."""


class StepSkipped(Exception):
    """The optimiser will not take the step that it was asked for: nobody else looks at its gradients."""


class Integrations(Integration):
    """A list of integrations as one. Each hook goes through the list in order; :meth:`on_end` in reverse.

    Args:
        members: in the order in which they are notified.
    """

    def __init__(self, members: Sequence[Integration]) -> None:
        self.members = tuple(members)
        self._started = ExitStack()

    def on_start(self, run: RunState) -> None:
        """Starts all, or none: where one fails, those before it are ended again."""
        with ExitStack() as started:
            for member in self.members:
                member.on_start(run)
                started.callback(member.on_end, run)
            self._started = started.pop_all()

    def before_step(self, run: RunState) -> None:
        for member in self.members:
            member.before_step(run)

    def before_read(self, run: RunState) -> None:
        for member in self.members:
            member.before_read(run)

    def on_decision(self, run: RunState, allocation: Allocation | None) -> None:
        for member in self.members:
            member.on_decision(run, allocation)

    def after_resize(self, run: RunState) -> None:
        for member in self.members:
            member.after_resize(run)

    def after_allocation(self, run: RunState) -> None:
        for member in self.members:
            member.after_allocation(run)

    def after_step(self, run: RunState) -> None:
        for member in self.members:
            member.after_step(run)

    def on_end(self, run: RunState) -> None:
        """Ends those that have started, also where one of them fails. A second call does nothing."""
        self._started.close()

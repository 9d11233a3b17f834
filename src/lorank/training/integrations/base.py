"""The protocol of integrations: processes, gradient scalers, ``torch.compile``, the fused forward, …

A run notifies its integrations in the order of their list. All of them are started inside an exit stack. If an
integration or the run cannot start, the integrations that have started are ended in reverse order, and the model is
unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from lorank.allocators import Allocation
from lorank.training.run_state import RunState


class Integration:
    """The base class of integrations. A hook does nothing unless it is overridden. The hooks run in this order:

        on_start → [before_step → the optimiser's step → (before_read → on_decision → after_resize → after_allocation)
        → after_step] for every step → on_end

    The hooks in round brackets run only in steps in which ranks are allocated. A backend for distributed training is an
    integration too (:mod:`lorank.training.parallel.backend`).
    """

    def on_start(self, run: RunState) -> None:
        """Called when the run begins, or continues from a checkpoint. No rank has changed yet.

        Raises:
            LorankError: the integration does not support this run. It must not have changed anything then.
        """

    def before_step(self, run: RunState) -> None:
        """Called before an optimiser step, when the gradients are complete. The method reads them after this hook.

        Raises:
            StepSkipped: the optimiser will skip this step.
        """

    def before_read(self, run: RunState) -> None:
        """Called before the adapter's weights and their moments are read, and perhaps resized."""

    def on_decision(self, run: RunState, allocation: Allocation | None) -> None:
        """Called after the method's decision, before any rank changes. ``allocation`` is None if nothing changes."""

    def after_resize(self, run: RunState) -> None:
        """Called after an allocation or after loading weights, when shapes may have changed."""

    def after_allocation(self, run: RunState) -> None:
        """Called after an allocation, whether or not ranks changed, when the method has updated its memory."""

    def after_step(self, run: RunState) -> None:
        """Called at the end of a step, after a due allocation, also if the step was skipped."""

    def on_end(self, run: RunState) -> None:
        """Called when the run ends or could not begin. Removes all that was added to the model or the optimiser."""


class StepSkipped(Exception):
    """The optimiser will skip the present step. Its gradients are not used."""


class Integrations(Integration):
    """A list of integrations, used as one. Each hook notifies them in order; :meth:`on_end` in reverse order.

    Args:
        members: the integrations, in the order in which they are notified.
    """

    def __init__(self, members: Sequence[Integration]) -> None:
        self.members = tuple(members)
        self._started = ExitStack()

    def on_start(self, run: RunState) -> None:
        """Starts all integrations. If one fails, those before it are ended again."""
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
        """Ends the integrations that have started, even if one of them fails. A second call does nothing."""
        self._started.close()

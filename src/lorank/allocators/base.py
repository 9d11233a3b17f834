"""What every rank allocator is: settings that do not change, a state apart from them, and one method.

A new method is one file here with one frozen dataclass. Its settings are the fields; :meth:`Allocator.allocate` says
which ranks go and where new ones come; the other methods are hooks that do nothing unless it needs them. Most methods
are made of three parts: a schedule (schedule.py), a scorer (:class:`lorank.scoring.Scorer`) and a reallocation
(reallocation.py, pruning_budget.py). A new score under ALoRA's rounds is a
:class:`~lorank.allocators.rounds.RoundAllocator` that names its scorer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.lora import AdapterLayers, HeadGroups, Plan
from lorank.scoring.context import Context, State, TrainingInfo

__all__ = ["Allocation", "Allocator", "Context", "State", "TrainingInfo"]


@dataclass(frozen=True)
class Allocation:
    """A decision.

    Args:
        plan: per layer, the ranks to keep and how many to add.
        scores: what it rests on: per layer, (r,) with one score per rank before the change, higher = keep.
        details: numbers for the history (loss, evaluations, seconds, …), JSON-serialisable.
        active: per layer, how many of its ranks count, where some that are physically there are switched off.
    """

    plan: Plan
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    active: Mapping[str, int] = field(default_factory=dict)


class Allocator(ABC):
    """Base of all methods. Subclasses are frozen dataclasses whose fields are the method's settings."""

    @property
    def needs_validation_batch(self) -> bool:
        """Whether ranks are scored on a batch of held-out data, which the user must then give."""
        return False

    @property
    def validation_samples(self) -> int:
        """How many rows that batch should have, where it is made of rows. The ALoRA paper takes 32."""
        return 32

    @property
    def sees_gradients(self) -> bool:
        """Whether :meth:`before_step` looks at the gradients of A and B, or changes them. Those of gates are always
        there."""
        return False

    @property
    def own_backward(self) -> bool:
        """Whether it makes backward passes of its own, outside the loop's."""
        return False

    moves_ranks: ClassVar[bool] = True
    """False for a baseline that never allocates, so that a run without an allocation is no surprise."""

    @abstractmethod
    def allocate(self, context: Context, state: State) -> Allocation | None:
        """Decides where ranks go, when :meth:`due` says that it is time. None: everything stays as it is."""

    def due(self, step: int, run: TrainingInfo) -> bool:
        """Whether ranks are allocated after optimiser step ``step`` (from 1). A pure function of its arguments."""
        return False

    def heads_of(self, layers: AdapterLayers) -> Mapping[str, HeadGroups]:
        """The heads that get ranks of their own, per layer. A new run's layers are brought into that form first."""
        return {}

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        """What the ranks must fit at the end of the run. None: nothing was named, and the method sets no bound."""
        return None

    def initial_plan(self, layers: AdapterLayers, run: TrainingInfo) -> Plan:
        """How a new run's ranks differ from those that the adapter was made with. A resumed run has its own."""
        return {}

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        """Checks the settings against the run, sets gates where the method has them, and returns the first state.

        Called before training, also when a run is resumed; the state and the gates are then replaced by the saved ones.

        Every tensor of the state is made on the device where the method computes with it: beside the gates, beside a
        weight, or on the CPU for a number that only the host reads. That is a contract: when a saved state is loaded,
        each tensor is moved to the device that the tensor of the same name has here (one without a namesake: to the
        adapter's), so no method moves what it has loaded.

        Raises:
            ScheduleError: the settings do not fit the run or the layers.
        """
        return {}

    def before_step(self, context: Context, state: State) -> None:
        """Before an optimiser step: gradients are there (clipped, if the loop clips), weights have not moved.

        The place for statistics of gradients, and for adding a penalty's gradient in closed form, so that the loss
        that the loop reports stays the task's own. ``context.step`` counts the steps done before this one. Gates that
        are learned have their gradients in ``layers.gates.grad``, which is cleared after :meth:`after_step`.
        """

    def after_step(self, context: Context, state: State) -> None:
        """After an optimiser step: the weights have moved. The place for a proximal step."""

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        """After ranks have moved: whatever the state holds per rank must follow, and new ranks need their gates.

        Args:
            origins: (R,) int64, for each rank of all layers in order, where it was before, or −1 for a new one
                (:func:`lorank.lora.rank_origins`). ``layers.gates.values`` has followed already, with 1 for new ranks.
        """

    def finish(self, context: Context, state: State) -> Allocation | None:
        """After the last step: the last decision. Then all gates are folded into B, and the adapter is plain."""
        return None

    def schedule(self, run: TrainingInfo) -> list[int]:
        """The steps at which ranks will be allocated."""
        return [step for step in range(1, run.total_steps + 1) if self.due(step, run)]

    def describe(self) -> dict[str, Any]:
        """The method and its settings, as saved with a run and compared when one is resumed."""
        settings = asdict(self) if hasattr(self, "__dataclass_fields__") else {}  # type: ignore[call-overload]  # guarded just before
        return {"method": type(self).__name__, **settings}

"""The base class of rank allocators: constant settings, a separate state, and one method that allocates ranks.

A new method of rank allocation is one file with one frozen dataclass. Its fields are the settings.
:meth:`Allocator.allocate` decides which ranks are pruned and which modules receive new ranks. The other methods of the
class are optional hooks; by default they do nothing. Most allocators have three parts: a schedule (schedule.py), a
scorer (:class:`lorank.scoring.Scorer`) and a reallocation (reallocation.py, pruning_budget.py). To use a new score in
ALoRA's rounds, derive from :class:`~lorank.allocators.rounds.RoundAllocator` and define its scorer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.lora import AdapterLayers, HeadGroups, Plan, SecondMoments
from lorank.scoring.context import Context, State, TrainingInfo
from lorank.scoring.scorer import ScoringNeeds

__all__ = ["Allocation", "Allocator", "Context", "State", "TrainingInfo"]


@dataclass(frozen=True)
class Allocation:
    """A decision of an allocator.

    Args:
        plan: per layer, the ranks to keep and the number of ranks to add.
        scores: the scores that were used: per layer, (r,) with one score per rank before the change, higher = keep.
        details: numbers for the history (loss, evaluations, seconds, …), JSON-serialisable.
        active: per layer, the number of active ranks, if some of the stored ranks are switched off.
        second_moments: where the optimiser's second moments of new ranks begin (:func:`lorank.lora.resize_`).
    """

    plan: Plan
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    active: Mapping[str, int] = field(default_factory=dict)
    second_moments: SecondMoments = "zero"


class Allocator(ScoringNeeds, ABC):
    """Base class of all methods. Subclasses are frozen dataclasses whose fields are the method's settings."""

    moves_ranks: ClassVar[bool] = True
    """False for a baseline that never allocates ranks. Then a run without an allocation is expected."""

    why_ranks_shrink: ClassVar[str] = "Compare it with other adapters of its own size"
    """The reason and the remedy, for a run whose ranks fall far below its budget."""

    @abstractmethod
    def allocate(self, context: Context, state: State) -> Allocation | None:
        """Decides which ranks are pruned and added. Called when :meth:`due` is true. None: no rank changes."""

    def due(self, step: int, run: TrainingInfo) -> bool:
        """Whether ranks are allocated after optimiser step ``step`` (from 1). A pure function of its arguments."""
        return False

    def heads_of(self, layers: AdapterLayers) -> Mapping[str, HeadGroups]:
        """Per layer, the attention heads with ranks of their own. A new run first converts its layers to this form."""
        return {}

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        """The budget that the ranks must fit at the end of the run. None: there is no budget."""
        return None

    @property
    def wants_train_batches(self) -> bool:
        """Whether :meth:`initial_plan` reads ``context.train_batches``."""
        return False

    def initial_plan(self, context: Context) -> Plan:
        """The plan from the ranks that the adapter was made with to the initial ranks of a new run.

        It is not used in a resumed run, which continues with its saved ranks.

        Args:
            context: the run before its first step. ``train_batches`` has the user's first batches of training data.

        Raises:
            ValidationBatchError: the method needs a batch to begin, and none was given or it gives no loss.
        """
        return {}

    def lr_factor(self, context: Context) -> float:
        """By what the adapter's learning rate is multiplied in the step that comes now. > 0.

        Called before every optimiser step. The optimiser's own rate, which schedules read and change, is restored
        after the step.
        """
        return 1.0

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        """Checks the settings against the run, sets gates if the method needs them, and returns the initial state.

        Called before training, also in a resumed run. There the saved state and gates then replace these.

        Every tensor of the state must be created on the device where the method uses it: the device of the gates or of
        a weight, or the CPU for a number that only Python code reads. When a saved state is loaded, each tensor is
        moved to the device of the tensor with the same name in this state (without such a tensor, to the adapter's
        device). Therefore no method needs to move a loaded tensor.

        Raises:
            ScheduleError: the settings do not fit the run or the layers.
        """
        return {}

    def try_out(self, context: Context, state: State) -> None:
        """Tries once what :meth:`allocate` and the hooks will do with the validation batch, before training.

        Called after :meth:`start`. Lorank has evaluated the loss on the batch before, if the method needs a batch.

        Args:
            context: the present values, of this process only. The validation batch is None if the user gave none.
            state: a copy of the state. Model, gates and random state are restored afterwards.

        Raises:
            ValidationBatchError: the batch is of no use to the method.
        """

    def before_step(self, context: Context, state: State) -> None:
        """Called before an optimiser step: gradients exist (clipped, if the loop clips), weights have not changed yet.

        Use it for statistics of gradients, and to add a penalty's gradient in closed form. Then the loss that the loop
        reports remains the task's loss. ``context.step`` counts the steps done before this one. The gradients of
        learned gates are in ``layers.gates.grad``, which is cleared after :meth:`after_step`.
        """

    def after_step(self, context: Context, state: State) -> None:
        """Called after an optimiser step, when the weights have changed. Use it for a proximal step, for example."""

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        """Called after a resize: reindexes the tensors of the state that have one entry per rank, and sets new gates.

        Args:
            origins: (R,) int64, for each rank of all layers in order, its index before the resize, or −1 for a new
                rank (:func:`lorank.lora.rank_origins`). ``layers.gates.values`` is already reindexed, with 1 for new
                ranks.
        """

    def finish(self, context: Context, state: State) -> Allocation | None:
        """The last decision, after the last step. Then all gates are folded into B, and the adapter is plain LoRA."""
        return None

    def schedule(self, run: TrainingInfo) -> list[int]:
        """The steps at which ranks will be allocated."""
        return [step for step in range(1, run.total_steps + 1) if self.due(step, run)]

    def describe(self) -> dict[str, Any]:
        """The method and its settings. They are saved with a run and compared when the run is resumed."""
        settings = asdict(self) if hasattr(self, "__dataclass_fields__") else {}  # type: ignore[call-overload]  # guarded just before
        return {"method": type(self).__name__, **settings}

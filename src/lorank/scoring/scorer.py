"""What every scorer is: settings that do not change, a state apart from them, and one method that scores ranks.

A new scorer is one file with one frozen dataclass. Its settings are the fields; :meth:`Scorer.score` gives one score
per rank; the other methods are hooks that do nothing unless it needs them. When ranks are scored and what becomes of
them is the allocator's own, which calls the hooks in the order in which they stand here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorank.lora.layer import AdapterLayers
from lorank.scoring.context import Context, State, TrainingInfo

Rank = tuple[str, int]
"""One rank: its layer's name and its index there."""
Choose = Callable[[Mapping[str, Tensor]], Collection[Rank]]
"""From scores, (r,) per layer, to the ranks that go. Where the score of a rank that stays rises, the same ranks must
go."""


@dataclass(frozen=True)
class Scores:
    """What the ranks are worth.

    Attributes:
        values: one (r,) tensor per layer, higher = keep; (0,) for a layer of rank 0.
        details: how the scores came about, for the history (loss, evaluations, …), JSON-serialisable.
    """

    values: Mapping[str, Tensor]
    details: Mapping[str, Any] = field(default_factory=dict)


class Scorer(ABC):
    """Base of all scorers. Subclasses are frozen dataclasses whose fields are the scorer's settings."""

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
        """Whether :meth:`before_step` looks at the gradients of A and B."""
        return False

    @property
    def own_backward(self) -> bool:
        """Whether it makes backward passes of its own, outside the loop's."""
        return False

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        """Sets gates where the scorer has them, and returns the first state.

        Each tensor is made on the device that it is used on: see
        :meth:`Allocator.start <lorank.allocators.base.Allocator.start>`.
        """
        return {}

    def before_step(self, context: Context, state: State) -> None:
        """Before an optimiser step that a score will follow: gradients are there, weights have not moved."""

    def after_step(self, context: Context, state: State) -> None:
        """After an optimiser step, up to and with the one after which ranks are scored for the last time."""

    @abstractmethod
    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        """What every rank is worth now.

        Args:
            context: the model, its layers and the batch, as they are now.
            state: what :meth:`start` returned and the hooks have changed.
            choose: which ranks the allocator would prune under given scores. A scorer may use it to leave out work
                that cannot change them.

        Raises:
            ValidationBatchError: the batch is missing, or cannot be scored on.
        """

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        """After ranks have moved: whatever the state holds per rank must follow.

        Args:
            origins: (R,) int64, for each rank of all layers in order, where it was before, or −1 for a new one
                (:func:`lorank.lora.rank_origins`). ``layers.gates.values`` has followed already, with 1 for new ranks.
        """

    def end(self, context: Context, state: State) -> None:
        """No score will be asked for any more: frees what the state keeps for scores alone.

        Called after the last score, and again after every later optimiser step, which a resumed run may begin with.
        """

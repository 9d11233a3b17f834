"""The base class of scorers: constant settings, a separate state, and one method that scores ranks.

A new scorer is one file with one frozen dataclass. Its fields are the settings. :meth:`Scorer.score` returns one score
per rank. The other methods are optional hooks; by default they do nothing. The allocator decides when ranks are scored
and which ranks are pruned. It calls the hooks in the order of this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorank.lora.basis import Basis
from lorank.lora.layer import AdapterLayers
from lorank.scoring.context import Context, State, TrainingInfo

Rank = tuple[str, int]
"""One rank: the name of its layer and its index in this layer."""
Choose = Callable[[Mapping[str, Tensor]], Collection[Rank]]
"""A function from scores, (r,) per layer, to the ranks to prune. If the score of a rank that is kept rises, the
function must return the same ranks as before."""


@dataclass(frozen=True)
class Scores:
    """The scores of all ranks.

    Attributes:
        values: one (r,) tensor per layer, higher = keep; (0,) for a layer of rank 0.
        details: how the scores were computed, for the history (loss, evaluations, …), JSON-serialisable.
        bases: the basis in which a layer's ranks have these scores, for layers that must be turned to it before ranks
            are pruned (:class:`lorank.lora.LayerPlan`). Other layers have their scores in the present basis.
    """

    values: Mapping[str, Tensor]
    details: Mapping[str, Any] = field(default_factory=dict)
    bases: Mapping[str, Basis] = field(default_factory=dict)


class ScoringNeeds:
    """What a scorer, or a method of allocation, needs of the training run."""

    @property
    def needs_validation_batch(self) -> bool:
        """Whether ranks are scored on a batch of held-out data. If so, the user must give one."""
        return False

    @property
    def validation_samples(self) -> int:
        """The number of rows to take for this batch, if the user gives rows. The ALoRA paper takes 32."""
        return 32

    @property
    def sees_gradients(self) -> bool:
        """Whether ``before_step`` reads or changes the gradients of A and B. Gradients of gates always exist."""
        return False

    @property
    def watches_passes(self) -> bool:
        """Whether it reads ``layers.gramians``, the second moments of what goes through every rank in training."""
        return False

    @property
    def own_backward(self) -> bool:
        """Whether it runs backward passes of its own, in addition to the training loop's."""
        return False


class Scorer(ScoringNeeds, ABC):
    """Base of all scorers. Subclasses are frozen dataclasses whose fields are the scorer's settings."""

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        """Sets gates if the scorer needs them, and returns the initial state.

        Each tensor is created on the device on which it is used, see
        :meth:`Allocator.start <lorank.allocators.base.Allocator.start>`.
        """
        return {}

    def try_out(self, context: Context, state: State) -> None:
        """Tries once what scoring will do, when a run begins, so that a mistake shows before training.

        By default it calls :meth:`score`, if the scorer needs a validation batch. A scorer whose scores cost much
        should run a small part of the same computation instead.

        Args:
            context: as for :meth:`score`, of this process only.
            state: a copy of the state. Model, gates and random state are restored afterwards.

        Raises:
            ValidationBatchError: the batch is missing, or ranks cannot be scored on it.
        """
        if self.needs_validation_batch:
            self.score(context, state, lambda scores: ())

    def before_step(self, context: Context, state: State) -> None:
        """Called before each optimiser step until the last scoring: gradients exist, weights have not changed yet."""

    def after_step(self, context: Context, state: State) -> None:
        """Called after each optimiser step, up to and including the step of the last scoring."""

    @abstractmethod
    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        """Scores every rank.

        Args:
            context: the current model, its layers and the batch.
            state: the state that :meth:`start` returned and the hooks have changed.
            choose: returns the ranks that the allocator would prune under given scores. A scorer may use it to skip
                work that cannot change this result.

        Raises:
            ValidationBatchError: the batch is missing, or ranks cannot be scored on it.
        """

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        """Called after a resize: every tensor of the state that has one entry per rank must be reindexed.

        Args:
            origins: (R,) int64, for each rank of all layers in order, its index before the resize, or −1 for a new
                rank (:func:`lorank.lora.rank_origins`). ``layers.gates.values`` is already reindexed, with 1 for new
                ranks.
        """

    def end(self, context: Context, state: State) -> None:
        """Frees the part of the state that only scores need, because no more scores will be computed.

        Called after the last scoring, and again after every later optimiser step, because a resumed run may start at
        such a step.
        """

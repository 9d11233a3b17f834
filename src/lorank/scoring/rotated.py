"""Any score that is measured at one moment, in the balanced basis of every module (scoring/balanced.py).

B A = (B M⁻¹)(M A) for every invertible M, so what a score says about a single rank depends on the basis that training
happened to arrive at. Here every module is turned to its balanced basis while its ranks are scored, and turned back
afterwards, bit for bit. The scores name the basis that they belong to; the plan that follows turns the modules that
lose ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorank.lora import AdapterLayers
from lorank.lora.basis import Basis, turn_ranks
from lorank.scoring.balanced import BalancedScorer
from lorank.scoring.context import Context, State, TrainingInfo
from lorank.scoring.scorer import Choose, Scorer, Scores


@dataclass(frozen=True)
class RotatedScorer(Scorer):
    """The scores of another scorer, in the balanced basis.

    Args:
        inner: a scorer without a state of its own: what it had collected would belong to other ranks.
    """

    inner: Scorer
    _balanced: BalancedScorer = field(default=BalancedScorer(), init=False, repr=False)

    @property
    def needs_validation_batch(self) -> bool:
        return self.inner.needs_validation_batch

    @property
    def validation_samples(self) -> int:
        return self.inner.validation_samples

    @property
    def watches_passes(self) -> bool:
        return True

    @property
    def own_backward(self) -> bool:
        return True  # where passes cannot be watched, Gramians are measured on the validation batch

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        """The state of the Gramians.

        Raises:
            ValueError: the inner scorer keeps a state.
        """
        if self.inner.start(layers, run):
            raise ValueError(f"{type(self.inner).__name__} keeps a state per rank, which a change of basis makes void")
        return self._balanced.start(layers, run)

    def try_out(self, context: Context, state: State) -> None:
        self.inner.try_out(context, state)

    def before_step(self, context: Context, state: State) -> None:
        self._balanced.before_step(context, state)

    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        """The inner scores of the turned layers, with the bases. The layers are as before afterwards."""
        bases = self._balanced.score(context, state, choose)
        with turned(context.layers, bases.bases):
            found = self.inner.score(context, {}, choose)
        return Scores(found.values, {**found.details, **bases.details}, bases.bases)

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        self._balanced.after_resize(context, state, origins)

    def end(self, context: Context, state: State) -> None:
        self._balanced.end(context, state)


@contextmanager
def turned(layers: AdapterLayers, bases: Mapping[str, Basis]) -> Iterator[None]:
    """The layers in other bases of their ranks. Afterwards A and B have their former values, bit for bit."""
    stored = [
        (weight, layers[name].axes[axis].expand_turn(basis.turn(axis)), axis)
        for name, basis in bases.items()
        for axis, weight in enumerate(layers[name].stored)
    ]
    before = [(weight, weight.detach().clone()) for weight, _, _ in stored]
    try:
        with torch.no_grad():
            for weight, turn, axis in stored:
                live = weight.narrow(axis, 0, len(turn.weight))  # with a pool, the dead ranks come after them
                live.copy_(turn_ranks(live, turn.weight, axis))
        yield
    finally:
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)

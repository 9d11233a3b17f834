"""Scores drawn at random: the control that tells whether a method's scores matter, or only its schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorank.scoring.context import Context, State
from lorank.scoring.scorer import Choose, Scorer, Scores

_PRIME = 1_000_003


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Uniform scores in [0, 1), from the seed of the run and the step. So every process draws the same ones."""

    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        draw = torch.Generator().manual_seed(context.run.seed * _PRIME + context.step)
        return Scores({name: torch.rand(layer.rank, generator=draw) for name, layer in context.layers.items()})

"""Refuses optimisers whose state cannot follow a change of ranks, and hides empty parameters from the others."""

from __future__ import annotations

from lorank.lora import check_optimizer
from lorank.training.integrations.base import Integration
from lorank.training.run_state import RunState


class OptimizerChecks(Integration):
    """Checks the optimiser at the start of a method that moves ranks, and removes empty gradients before each step."""

    def on_start(self, run: RunState) -> None:
        """Raises OptimizerStateError if the optimiser is one of those that lorank refuses."""
        if run.allocator.moves_ranks:
            weights = [weight for layer in run.layers.values() for weight in (layer.A, layer.B)]
            check_optimizer(run.optimizer, weights)

    def before_step(self, run: RunState) -> None:
        """Sets the gradients of empty parameters to None, so that the optimiser passes over them.

        A module at rank 0 keeps two empty parameters in the optimiser. Some optimisers divide by their sizes.
        """
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.numel():
                    parameter.grad = None

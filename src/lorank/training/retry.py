"""How a run begins after one of the same adapter that stopped before its end (:mod:`lorank.training.attached_runs`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress

from lorank.allocators import TrainingInfo
from lorank.errors import AdapterError
from lorank.lora import (
    AdapterLayers,
    HeadGroups,
    Plan,
    plan_for_rank,
    resize_,
    split_again_,
    split_into_heads_,
)
from lorank.training.attached_runs import RunBeginning
from lorank.training.run_state import RunState

logger = logging.getLogger("lorank")


def split_(run: RunState, groups: Mapping[str, HeadGroups], retried: RunBeginning | None) -> None:
    """Gives the layers the per-head form: that of the interrupted run if they still have its weights."""
    if retried is not None and {name: heads for name, (heads, _) in retried.heads.items()} == dict(groups):
        with suppress(AdapterError):  # other weights: an error is raised below if they cannot be split
            split_again_(run.layers, retried.heads, run.optimizer)
            return
    split_into_heads_(
        run.layers, groups, run.optimizer, seed=run.seed - 1
    )  # another seed than that of the initial plan


def continue_with_ranks_(run: RunState, interrupted: RunBeginning) -> None:
    """Gives the layers the ranks with which a run begins after one that did not come to its end.

    The same method goes on with the ranks that the interrupted run has left, because a plan for a fresh adapter
    would remove trained ranks. So does a method without a budget. Another method begins as on the adapter that the
    interrupted run was given, but only in layers that are untrained.
    """
    layers = run.layers
    if interrupted.method != run.allocator.describe():
        resize_(layers, _initial_plan_of_untrained(layers, run.info), run.optimizer, seed=run.seed)
        if run.budget is not None:
            resize_(layers, run.allocator.initial_plan(run.context()), run.optimizer, seed=run.seed)
    logger.warning(
        "the last run of this adapter (%s) stopped before its end. This run is a retry: it has that run's initial "
        "%d ranks and so its budget, and begins with the %d ranks that are there now. If the last run was meant to "
        "end where it did, call ranks.finish() before the next attach",
        interrupted.method.get("method"),
        sum(run.info.initial_ranks.values()),
        layers.total_rank,
    )


def _initial_plan_of_untrained(layers: AdapterLayers, info: TrainingInfo) -> Plan:
    """The plan that gives layers without an update (B = 0) the ranks that the adapter was made with."""
    return {
        name: plan_for_rank(layer.rank, info.initial_ranks[name])
        for name, layer in layers.items()
        if layer.groups is None and layer.rank != info.initial_ranks[name] and not (layer.A.any() and layer.B.any())
    }

"""The first moment of a run: the layers get the form and the ranks with which the method begins or continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorank.lora import compensate_gates_, resize_
from lorank.training import attached_runs
from lorank.training.checkpoint.base_fingerprint import base_fingerprint
from lorank.training.checkpoint.rank_state import STATE_KEY, check_resumable, restore_layers_
from lorank.training.checks import (
    check_batch,
    check_optimizer_state,
    check_state_follows,
    check_weight_copies,
    try_scoring,
)
from lorank.training.integrations.base import Integrations
from lorank.training.retry import continue_with_ranks_, split_
from lorank.training.run_state import RunState


def start_(
    run: RunState,
    integrations: Integrations,
    saved: Mapping[str, Any] | None,
    *,
    make_plain: Callable[[], None],
    restore: Callable[[Mapping[str, Any]], None],
) -> None:
    """Gives the layers the form and the ranks with which the method begins, or with which a saved run continues.

    Args:
        run: the run. Its layers are changed in place; the caller restores them if this raises.
        integrations: its integrations, which have started.
        saved: the rank state of a checkpoint, from the optimiser; None for a new run.
        make_plain: turns the layers into plain LoRA.
        restore: restores the run from ``saved``.

    Raises:
        LorankError: the run cannot begin or continue; see :func:`lorank.attach`.
    """
    layers, allocator, optimizer = run.layers, run.allocator, run.optimizer
    make_plain()  # a run that was garbage-collected has left its gates
    if saved is None:
        integrations.before_read(run)
    check_batch(run)
    run.base = base_fingerprint(layers)
    retried = attached_runs.interrupted_beginning(layers) if saved is None else None
    if saved is not None:
        check_resumable(saved, run)
        restore_layers_(run, saved)
    elif groups := allocator.heads_of(layers):
        split_(run, groups, retried)
    run.budget = allocator.resolve_budget(layers, run.info)
    if saved is None:
        check_optimizer_state(run)
        if any(layer.A in optimizer.state or layer.B in optimizer.state for layer in layers.values()):
            check_state_follows(run)
        run.load_train_batches()
        if retried is None:
            resize_(layers, allocator.initial_plan(run.context()), optimizer, seed=run.seed)
        else:
            continue_with_ranks_(run, retried)
    # The weights of a finished run are final: the method must not start again.
    run.memory = {} if saved and saved["finished"] else allocator.start(layers, run.info)
    check_weight_copies(run)
    run.learns_gates = layers.gates is not None
    if saved is None:
        compensate_gates_(layers)
        check_optimizer_state(run)
        try_scoring(run)
        integrations.after_resize(run)
        run.train_batches = ()  # they are not needed again
    else:
        restore(saved)
        del optimizer.param_groups[0][STATE_KEY]  # only now: a state that is refused stays in the optimiser
        try_scoring(run)
    integrations.after_allocation(run)

"""ALoRA-DNAS, a variant in the ALoRA paper (arXiv 2403.16187): its rounds, with gates found as in DARTS (1806.09055).

    y = W x + s · B (g ⊙ (A x))        g = 2 σ(a'), a' from 0, so that g starts at 1

A and B learn on the training data by the user's optimiser, a' on a second split by an Adam of its own, in turns
(first-order bi-level optimisation): after an optimiser step, one forward and backward pass on rows of the split gives

    ∂L_split/∂a' = ∂L_split/∂g · g (1 − g/2)

with A and B as they are. The score of a rank is its gate; a new rank has a' = 0 and moments of zero. Rounds, budget and
everything that a score does not decide are ALoRA's (allocators/rounds.py). After the last round nothing is searched any
more: gates stay as they were found, A and B go on learning under them, and at the end the gates are folded into B.

The pass on the split leaves no trace but a'. It is made in evaluation mode, since dropout would only add noise to what
is measured, and in the model's own precision, outside the loop's autocast. The training pass leaves the gates out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorank.allocators.adam import adam_step_, resize_adam_, start_adam
from lorank.allocators.base import Allocation, Allocator, Context, State, TrainingInfo
from lorank.allocators.budget import BudgetLike, as_budget
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.allocators.rounds import Rounds
from lorank.errors import ScheduleError, ValidationBatchError
from lorank.lora import AdapterLayers, LearnedGates, Plan
from lorank.lora.rank_index import reindex_ranks
from lorank.scoring.loss import loss_with_graph, prepare_batch, require_finite, unwrap_model
from lorank.scoring.preserve_state import preserve_state


@dataclass(frozen=True)
class ALoRADNAS(Allocator):
    """ALoRA with gates that are searched for. Give it the second split as ``validation_batch``, all its rows.

    Args:
        k1: K1, how long to train before the first round: 1 epoch. > 0.
        k2: K2, how long to train between rounds: 0.25 epoch. > 0.
        rounds: N_A, how many rounds at most: 8. ≥ 1.
        unit: what ``k1`` and ``k2`` count, ``"epochs"`` or optimiser ``"steps"``.
        per_round: n_A, ranks pruned and given in each round, over all modules; None: as many as there are modules.
        retry_empty: whether a module at rank 0 may receive ranks again.
        gate_lr: learning rate of a': 1e-2. > 0.
        search_every: optimiser steps between two steps of a': 1, as in DARTS. ≥ 1.
        search_rows: rows of the split in each of them, taken in turn: 8. ≥ 1.
        budget: what the adapter may cost at any time; None: as many ranks as it was made with.

    Raises:
        ScheduleError: a setting out of its range.
        BudgetError: a budget that cannot be read; at the start of a run, one that does not fit the modules.
        ValidationBatchError: while training, a loss on the split that is not finite.
    """

    k1: float = 1.0
    k2: float = 0.25
    rounds: int = 8
    unit: Literal["epochs", "steps"] = "epochs"
    per_round: int | None = None
    retry_empty: bool = False
    gate_lr: float = 1e-2
    search_every: int = 1
    search_rows: int = 8
    budget: BudgetLike = None

    needs_validation_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Rounds.of(self).check()
        if not (self.gate_lr > 0 and math.isfinite(self.gate_lr)):
            raise ScheduleError(f"ALoRADNAS(gate_lr={self.gate_lr}): expected a number above 0")
        for name in ("search_every", "search_rows"):
            if getattr(self, name) < 1:
                raise ScheduleError(f"ALoRADNAS({name}={getattr(self, name)}): expected at least 1")
        object.__setattr__(self, "budget", as_budget(self.budget))

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        Rounds.of(self).check_run(layers, run)
        dtype = torch.promote_types(next(iter(layers.values())).A.dtype, torch.float32)
        gates = layers.learn_gates(torch.ones(layers.total_rank, dtype=dtype))
        gates.freeze()
        alphas = torch.zeros_like(gates.values)
        return {"alphas": alphas, "searched": torch.zeros((), dtype=torch.long), **start_adam(alphas)}

    @property
    def own_backward(self) -> bool:
        return True  # the search

    def resolve_budget(self, layers: AdapterLayers, run: TrainingInfo) -> ResolvedBudget | None:
        return Rounds.of(self).resolve_budget(layers)

    def initial_plan(self, layers: AdapterLayers, run: TrainingInfo) -> Plan:
        return Rounds.of(self).initial_plan(layers)

    def due(self, step: int, run: TrainingInfo) -> bool:
        return Rounds.of(self).due(step, run)

    def after_step(self, context: Context, state: State) -> None:
        gates = context.layers.gates
        if gates is None:
            return
        if context.step % self.search_every == 0 and context.step <= Rounds.of(self).last(context.run):
            self._search(context, state, gates)
        gates.freeze()  # also those of a resumed run

    def allocate(self, context: Context, state: State) -> Allocation | None:
        layers = context.layers
        if layers.gates is None:
            return None
        values = torch.split(layers.gates.values.double().cpu(), list(layers.ranks.values()))
        return Rounds.of(self).allocation(layers, dict(zip(layers, values, strict=True)), {})

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        state["alphas"] = reindex_ranks(state["alphas"], origins)
        resize_adam_(state, origins)
        if context.layers.gates is not None:
            context.layers.gates.freeze()

    def _search(self, context: Context, state: State, gates: LearnedGates) -> None:
        """One step of a' on the next rows of the split."""
        if context.validation_batch is None:
            raise ValidationBatchError(
                "ALoRADNAS learns its gates on a second split of the data: give validation_batch=…, with all its rows"
            )
        rows = rows_in_turn(context.validation_batch, int(state["searched"]), self.search_rows)
        state["searched"] += 1
        model = unwrap_model(context.model)
        leaves = list(gates.leaves.values())
        gates.freeze(False)
        with preserve_state(model, context.layers), torch.enable_grad():
            loss = loss_with_graph(
                model, prepare_batch(model, rows, needs_labels=context.loss_fn is None), context.loss_fn
            )
            require_finite(loss.detach(), "the model")
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        with torch.no_grad():
            grad = torch.cat(
                [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
            )  # (R,)
            grad = context.mean(grad)
            values = gates.values
            alphas = state["alphas"] = state["alphas"].to(values.device)
            adam_step_(alphas, grad * values * (1 - values / 2), state, self.gate_lr)
            values.copy_(2 * torch.sigmoid(alphas))


def rows_in_turn(batch: Mapping[str, Any], turn: int, count: int) -> dict[str, Any]:
    """The ``count`` rows that turn ``turn`` (from 0) has, going round and round; all of them where there are no more.

    Args:
        batch: tensors whose first axis counts rows, and anything else, which stays as it is.
    """
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    if len(sizes) != 1:
        raise ValidationBatchError(
            f"the tensors of the validation batch have {sorted(sizes)} rows: expected the same number in each, so that "
            "some can be taken in turn"
        )
    (rows,) = sizes
    if count >= rows:
        return dict(batch)
    picked = (turn * count + torch.arange(count)) % rows  # (count,)
    return {
        key: value[picked.to(value.device)] if isinstance(value, Tensor) and value.dim() else value
        for key, value in batch.items()
    }

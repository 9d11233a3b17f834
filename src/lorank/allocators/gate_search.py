"""Differentiable search of gates, as in DARTS (arXiv 1806.09055). The score of a rank is its gate.

    g = 2 σ(a')        ∂L_split/∂a' = ∂L_split/∂g · g (1 − g/2)

This is first-order bi-level optimisation. The user's optimiser trains A and B on the training data. After its step, one
forward and one backward pass on rows of a second split give the gradient of a', with A and B constant, and a separate
Adam updates a'. A new rank has a' = 0 and moments of zero.

The pass on the second split changes only a'. It runs in evaluation mode, because dropout would add noise to the
gradient, and in the model's own precision, outside the loop's autocast. The training pass does not train the gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorank.allocators.gate_adam import adam_step_, resize_adam_, start_adam
from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayers, LearnedGates
from lorank.lora.rank_index import reindex_ranks
from lorank.scoring import Choose, Context, Scorer, Scores, State, TrainingInfo
from lorank.scoring.loss import loss_gradients, loss_with_graph, prepare_batch, require_finite, unwrap_model
from lorank.scoring.preserve_state import preserve_state


@dataclass(frozen=True)
class GateSearchScorer(Scorer):
    """Scores every rank by its gate. The gates are searched until the last scoring; then they stay constant.

    Args:
        gate_lr: learning rate of a'. > 0.
        search_every: optimiser steps between two steps of a'. ≥ 1.
        search_rows: rows of the second split that each step of a' uses, taken in turn. ≥ 1.
    """

    gate_lr: float
    search_every: int
    search_rows: int

    @property
    def needs_validation_batch(self) -> bool:
        return True

    @property
    def own_backward(self) -> bool:
        return True  # the search

    def start(self, layers: AdapterLayers, run: TrainingInfo) -> State:
        dtype = torch.promote_types(next(iter(layers.values())).A.dtype, torch.float32)
        gates = layers.learn_gates(torch.ones(layers.total_rank, dtype=dtype))
        gates.freeze()
        alphas = torch.zeros_like(gates.values)
        return {"alphas": alphas, "searched": torch.zeros((), dtype=torch.long), **start_adam(alphas)}

    def try_out(self, context: Context, state: State) -> None:
        assert context.layers.gates is not None  # from start
        self._gradient(context, context.layers.gates, 0)

    def after_step(self, context: Context, state: State) -> None:
        gates = context.layers.gates
        if gates is None:
            return
        if context.step % self.search_every == 0:
            self._search(context, state, gates)
        gates.freeze()  # also those of a resumed run

    def score(self, context: Context, state: State, choose: Choose) -> Scores:
        layers = context.layers
        assert layers.gates is not None
        values = torch.split(layers.gates.values.double().cpu(), list(layers.ranks.values()))
        return Scores(dict(zip(layers, values, strict=True)))

    def after_resize(self, context: Context, state: State, origins: Tensor) -> None:
        state["alphas"] = reindex_ranks(state["alphas"], origins)
        resize_adam_(state, origins)
        if context.layers.gates is not None:
            context.layers.gates.freeze()

    def end(self, context: Context, state: State) -> None:
        if context.layers.gates is not None:
            context.layers.gates.freeze()  # also those of a resumed run

    def _search(self, context: Context, state: State, gates: LearnedGates) -> None:
        """One step of a' on the next rows of the split."""
        grad = context.mean(self._gradient(context, gates, int(state["searched"])))  # (R,)
        state["searched"] += 1
        with torch.no_grad():
            values = gates.values
            alphas = state["alphas"]
            adam_step_(alphas, grad * values * (1 - values / 2), state, self.gate_lr)
            values.copy_(2 * torch.sigmoid(alphas))

    def _gradient(self, context: Context, gates: LearnedGates, turn: int) -> Tensor:
        """∂L_split/∂g, (R,), on the rows of the split that step ``turn`` (from 0) uses."""
        if context.validation_batch is None:
            raise ValidationBatchError(
                "gates are searched on a second split of the data: give validation_batch=…, with all its rows"
            )
        rows = cyclic_rows(context.validation_batch, turn, self.search_rows)
        model = unwrap_model(context.model)
        leaves = list(gates.leaves.values())
        gates.freeze(False)
        with preserve_state(model, context.layers), torch.enable_grad():
            loss = loss_with_graph(
                model, prepare_batch(model, rows, needs_labels=context.loss_fn is None), context.loss_fn
            )
            require_finite(loss.detach(), "the model")
            found = loss_gradients(loss, leaves)
        return torch.cat([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]).detach()


def cyclic_rows(batch: Mapping[str, Any], turn: int, count: int) -> dict[str, Any]:
    """The ``count`` rows of a batch that step ``turn`` (from 0) uses, starting again at row 0 after the last row.

    Args:
        batch: tensors whose first axis counts rows; other values are returned unchanged.
        turn: the index of the step, ≥ 0.
        count: the number of rows; all rows are returned if the batch has no more than ``count``.

    Raises:
        ValidationBatchError: the tensors do not all have the same number of rows.
    """
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    if len(sizes) != 1:
        raise ValidationBatchError(
            f"the tensors of the validation batch have {sorted(sizes)} rows: expected the same number of rows in each, "
            "because each step uses some of them. Give tensors with one row per sample"
        )
    (rows,) = sizes
    if count >= rows:
        return dict(batch)
    picked = (turn * count + torch.arange(count)) % rows  # (count,)
    return {
        key: value[picked.to(value.device)] if isinstance(value, Tensor) and value.dim() else value
        for key, value in batch.items()
    }

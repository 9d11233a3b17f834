"""First values of ranks that enter during a run: along the residual gradient, where they lower the loss most.

A rank that enters has B = 0. The gradient of its column of B is then s G a, with its row a of A and G = ∂L/∂W at the
present weights. A random a finds a small part of G: of n inputs, about one in n of its squared norm. So a is a right
singular vector of G, largest first. What lies in the row space of the module's present A is taken out before: the
ranks that are there reach it already. In a LoRA per head, G is the block of the head. In an embedding, a column of B
begins along a left singular vector.

G is taken on the validation batch, in evaluation mode, in parts of eight samples. It is the batch on which ranks are
scored, so a run needs no other data, and all processes and a resumed run see the same one. Its size is the user's
choice: the more tokens, the less noise. The training batches of ``attach`` would not do: they are for the start, and
the model has been trained on them since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch

from lorank.allocators.base import Context
from lorank.allocators.gradient_start import vectors_along
from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayer, LayerPlan, NewVectors, Plan
from lorank.scoring import residual_gradients
from lorank.scoring.ablation_variants import IncompatibleError
from lorank.scoring.balanced import ROWS
from lorank.scoring.loss import prepare_batch, unwrap_model
from lorank.scoring.microbatch import split

NewRanks: TypeAlias = Literal["random", "gradient"]
"""How A begins at a rank that enters: as PEFT initialises it, or along the residual gradient."""

SAMPLES = 128
"""Samples to take for the gradient, if the user gives rows."""


def with_directions(context: Context, plan: Plan) -> Plan:
    """The plan, with the first values of new ranks along the residual gradient. Kept ranks do not change.

    A layer whose residual gradient has too few directions (the loss does not depend on it, say) is left as it is.

    Args:
        context: has the model, its layers and the validation batch.
        plan: the ranks to keep and to add.

    Raises:
        ValidationBatchError: there is no validation batch, or it gives no loss.
    """
    counts = {name: _entering(context.layers[name], change) for name, change in plan.items() if change.add}
    if not counts:
        return plan
    found = residual_gradients(
        context.model,
        context.layers,
        _parts(context),
        counts,
        loss_fn=context.loss_fn,
        seed=context.run.seed * 1_000_003 + context.step,
        mean=context.mean,
    )
    with_vectors = dict(plan)
    for name, of_groups in found.items():
        entering = [(gradient, counts[name][group]) for group, gradient in of_groups.items()]
        if all(int((gradient.values > 0).sum()) >= count for gradient, count in entering):
            rows = [vectors_along(context.layers[name], gradient, count) for gradient, count in entering]
            with_vectors[name] = replace(plan[name], vectors=NewVectors(torch.cat(rows)))
    return with_vectors


def try_directions(context: Context) -> None:
    """Takes the gradient of one layer on a part of the validation batch, so that a mistake shows before training.

    Raises:
        ValidationBatchError: there is no validation batch, or it gives no loss.
    """
    name, layer = next(iter(context.layers.items()))
    counts = {name: [1] * len(layer.head_ranks)}
    residual_gradients(context.model, context.layers, _parts(context)[:1], counts, loss_fn=context.loss_fn)


def _entering(layer: AdapterLayer, change: LayerPlan) -> list[int]:
    """The number of new ranks of each group of a layer: of each head, or of the whole layer."""
    if change.head_ranks is None:
        return [change.add]
    owners = [head for head, rank in enumerate(change.head_ranks) for _ in range(rank)]
    new = [head for head, origin in zip(owners, change.origins, strict=True) if origin < 0]
    return [new.count(head) for head in range(len(change.head_ranks))]


def _parts(context: Context) -> list[Mapping[str, Any]]:
    if context.validation_batch is None:
        raise ValidationBatchError(
            "new ranks begin along the gradient on a fixed batch of data: give validation_batch=…, or "
            "new_ranks='random'"
        )
    prepared = prepare_batch(
        unwrap_model(context.model), context.validation_batch, needs_labels=context.loss_fn is None
    )
    if context.loss_fn is not None:  # it may weight its samples in any way
        return [prepared]
    try:
        return split(prepared, ROWS)
    except IncompatibleError:
        return [prepared]

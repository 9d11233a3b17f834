"""Ranks that enter along the residual gradient: their first values, and what these bring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorank.allocators import Context, TrainingInfo
from lorank.allocators.new_ranks import with_directions
from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayers, LayerPlan, Plan, find_layers, plan_for_heads, plan_for_rank, resize_
from lorank.scoring import residual_gradients
from tests.lora.forms import OUT, Q, in_heads
from tests.models import adapted, tiny_llama, token_batch

BATCH = token_batch(rows=6, seed=9)


def context(layers: AdapterLayers) -> Context:
    return Context(3, TrainingInfo(10), layers.model, layers, BATCH)


def gradient_of_new(layers: AdapterLayers, plan: Plan) -> float:
    """The norm of ∂L/∂B over the new ranks of all layers."""
    resize_(layers, plan)
    layers.model.eval()
    layers.model.zero_grad()
    layers.model(**BATCH).loss.backward()
    parts = [layers[name].B.grad[:, torch.tensor(change.origins) < 0].flatten() for name, change in plan.items()]
    return float(torch.cat(parts).norm())


def test_new_rows_are_the_residual_gradients_vectors_after_the_kept_ones() -> None:
    layers = find_layers(adapted(tiny_llama()))
    plan = {name: LayerPlan((2, 0), 2 + index % 2) for index, name in enumerate(list(layers)[:5])}
    rows = {name: layers[name].A.detach().clone() for name in plan}
    # the twin takes the whole batch at once: it has less than one part
    expected = residual_gradients(layers.model, layers, [BATCH], {name: [c.add] for name, c in plan.items()})
    with_vectors = with_directions(context(layers), plan)
    output = layers.model.eval()(**BATCH).logits
    resize_(layers, {name: replace(change, keep=(0, 1, 2, 3)) for name, change in with_vectors.items()})
    torch.testing.assert_close(layers.model(**BATCH).logits, output)
    for name, change in plan.items():
        A = layers[name].A.detach()
        assert torch.equal(A[:4], rows[name])
        norm = rows[name].norm(dim=1).mean()
        torch.testing.assert_close(A[4:].norm(dim=1), norm.expand(change.add))
        torch.testing.assert_close(A[4:] / norm, expected[name][0].right[:, : change.add].T.float())
        assert not layers[name].B.detach()[:, 4:].any()
        assert (A[4:] @ rows[name].T).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["plain", "heads"])
def test_the_gradient_of_new_ranks_is_far_above_that_of_random_ones(form: str) -> None:
    norms = []
    for directed in (True, False):
        if form == "plain":
            layers = find_layers(adapted(tiny_llama()))
            plan: Plan = {name: plan_for_rank(layer.rank, layer.rank + 1) for name, layer in layers.items()}
        else:
            _, layers, _ = in_heads()
            heads = {name: layers[name].head_ranks for name in (Q, OUT)}
            plan = {name: plan_for_heads(ranks, [3, 2, *[3] * (len(ranks) - 2)]) for name, ranks in heads.items()}
        norms.append(gradient_of_new(layers, with_directions(context(layers), plan) if directed else plan))
    assert norms[0] > 1.5 * norms[1]


def test_kept_ranks_of_other_heads_stay_where_they_are() -> None:
    _, layers, _ = in_heads()
    before = layers[Q].A.detach().clone()
    ranks = layers[Q].head_ranks
    plan = {Q: plan_for_heads(ranks, [ranks[0], ranks[1] + 2, *ranks[2:]])}
    resize_(layers, with_directions(context(layers), plan))
    new = torch.tensor(plan[Q].origins) < 0
    assert torch.equal(layers[Q].A[~new], before)
    assert layers[Q].head_ranks[1] == ranks[1] + 2


def test_a_plan_without_new_ranks_needs_no_data() -> None:
    layers = find_layers(adapted(tiny_llama()))
    plan = {Q: LayerPlan((1,))}
    assert with_directions(Context(0, TrainingInfo(1), layers.model, layers), plan) == plan
    with pytest.raises(ValidationBatchError, match="give validation_batch"):
        with_directions(Context(0, TrainingInfo(1), layers.model, layers), {Q: LayerPlan((1,), 1)})


def test_a_layer_without_a_residual_gradient_is_left_to_chance() -> None:
    layers = find_layers(adapted(tiny_llama()))
    unused = Context(0, TrainingInfo(1), layers.model, layers, BATCH, lambda model, batch: 0 * model(**batch).loss)
    plan = {Q: plan_for_rank(4, 6)}
    assert with_directions(unused, plan)[Q].vectors is None

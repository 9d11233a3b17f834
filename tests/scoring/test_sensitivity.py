"""Smoothed sensitivity against the formula written out weight by weight, and after a resize."""

from __future__ import annotations

import pytest
import torch

from lorank.lora import AdapterLayers, LayerPlan, find_layers, rank_origins, resize_
from lorank.scoring import Context, SensitivityScorer, State, TrainingInfo
from lorank.scoring.sensitivity import rank_products
from tests.models import adapted, tiny_llama, token_batch

RUN = TrainingInfo(10)
SCORER = SensitivityScorer()


def context(layers: AdapterLayers) -> Context:
    return Context(1, RUN, layers.model, layers)


def scores_of(layers: AdapterLayers, state: State) -> dict[str, torch.Tensor]:
    return dict(SCORER.score(context(layers), state).values)


def gradients(model: torch.nn.Module, seed: int) -> None:
    model.zero_grad()
    model(**token_batch(seed=seed)).loss.backward()


def test_scores_are_the_formula_over_many_steps() -> None:
    model = adapted(tiny_llama(1)).double()
    layers = find_layers(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    state = SCORER.start(layers, RUN)
    mean, uncertainty = {}, {}
    for seed in range(20):
        gradients(model, seed)
        SensitivityScorer(0.8, 0.9).before_step(context(layers), state)
        for name, layer in layers.items():
            weights = {"A": layer.A, "B": layer.B}
            now = {kind: (w * w.grad).detach().abs() for kind, w in weights.items()}
            now["gate"] = (layer.A * layer.A.grad).detach().sum(1).abs()
            for kind, value in now.items():
                key = (name, kind)
                mean[key] = 0.8 * mean.get(key, 0 * value) + 0.2 * value
                uncertainty[key] = 0.9 * uncertainty.get(key, 0 * value) + 0.1 * (value - mean[key]).abs()
        optimizer.step()
    for name, scores in scores_of(layers, state).items():
        s = {kind: mean[name, kind] * uncertainty[name, kind] for kind in ("A", "B", "gate")}
        torch.testing.assert_close(scores, s["gate"] + s["A"].mean(1) + s["B"].mean(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_the_product_of_a_gate_and_its_gradient_needs_no_gate(lora: dict[str, bool]) -> None:
    model = adapted(tiny_llama(), **lora).double()
    layers = find_layers(model)
    values = torch.rand(layers.total_rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    gates = layers.learn_gates(values)
    gradients(model, 0)
    torch.testing.assert_close(rank_products(layers), values * gates.grad, rtol=1e-9, atol=1e-14)


def test_an_embedding_and_weights_that_no_loss_reached() -> None:
    model = adapted(tiny_llama(), target_modules=["embed_tokens", "q_proj"])
    layers = find_layers(model)
    state = SCORER.start(layers, RUN)
    SCORER.before_step(context(layers), state)
    assert not SCORER.has_measured(state)
    gradients(model, 0)
    SCORER.before_step(context(layers), state)
    assert all((scores > 0).all() and len(scores) == 4 for scores in scores_of(layers, state).values())


def test_half_precision_products_do_not_vanish() -> None:
    layers = find_layers(adapted(tiny_llama()).half())
    for layer in layers.values():
        layer.A.data.fill_(1e-4)
        layer.B.data.fill_(1e-4)
        layer.A.grad = torch.full_like(layer.A, 1e-5)
        layer.B.grad = torch.full_like(layer.B, 1e-5)
    state = SCORER.start(layers, RUN)
    SCORER.before_step(context(layers), state)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all((tensor > 0).all() for tensor in state.values())


def test_kept_ranks_keep_their_statistics_through_a_resize() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    state = SCORER.start(layers, RUN)
    for seed in range(3):
        gradients(model, seed)
        SCORER.before_step(context(layers), state)
    before = scores_of(layers, state)
    names = list(layers)
    plan = {names[0]: LayerPlan((3, 1)), names[2]: LayerPlan((0, 1, 2, 3), 2), names[3]: LayerPlan(())}
    origins = rank_origins(plan, layers.ranks)
    resize_(layers, plan)
    SCORER.after_resize(context(layers), state, origins)
    after = scores_of(layers, state)
    assert after[names[0]].tolist() == before[names[0]][[3, 1]].tolist()
    assert after[names[1]].tolist() == before[names[1]].tolist()
    assert after[names[2]].tolist() == [*before[names[2]].tolist(), 0, 0]
    assert after[names[3]].tolist() == []
    assert after[names[4]].tolist() == before[names[4]].tolist()
    gradients(model, 3)
    SCORER.before_step(context(layers), state)  # shapes fit
    SCORER.end(context(layers), state)
    SCORER.after_resize(context(layers), state, origins)
    assert state == {}


def test_statistics_are_made_beside_their_weights() -> None:
    layers = find_layers(adapted(tiny_llama()))
    layers.model.to("meta")
    assert {tensor.device.type for tensor in SCORER.start(layers, RUN).values()} == {"meta"}

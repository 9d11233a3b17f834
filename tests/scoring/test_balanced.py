"""Balanced truncation against a quadratic model of the loss that is built in full, and what it must leave unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lorank.errors import NonFiniteError, ValidationBatchError
from lorank.lora import AdapterLayer, AdapterLayers, Gramians, LayerPlan, find_layers, resize_
from lorank.scoring import BalancedScorer, Context, GramianPair, TrainingInfo, balance, measure_gramians
from lorank.scoring.balanced import SMALLEST, Balanced
from tests.lora.bases import random_basis
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch

TOKENS, D_IN, D_OUT, RANK, S = 12, 5, 4, 3, 2.0


class OneMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(D_IN, D_OUT)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.linear(inputs)
        return output


def one_map(rank: int = RANK) -> tuple[nn.Module, AdapterLayers, AdapterLayer]:
    """A model in float64 with one adapted map, B random."""
    config = LoraConfig(r=max(rank, 1), lora_alpha=S * max(rank, 1), target_modules=["linear"])
    model = get_peft_model(OneMap(), config).double()  # type: ignore[arg-type]
    layers = find_layers(model)
    (layer,) = layers.values()
    with torch.no_grad():
        layer.B.normal_(generator=torch.Generator().manual_seed(1))
    return model, layers, layer


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, D_IN, generator=generator, dtype=torch.float64) * torch.arange(1, D_IN + 1)
    return {"inputs": x, "labels": torch.randint(0, D_OUT, (TOKENS,), generator=generator)}


def loss_fn(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])


def quadratic_model(model: nn.Module) -> np.ndarray:
    """The Kronecker-factored empirical Fisher matrix of W, for its columns one below the other: (d_in d_out)²."""
    data = batch()
    output = model(data["inputs"])
    every = nn.functional.cross_entropy(output, data["labels"], reduction="none")
    dy = torch.stack([torch.autograd.grad(one, output, retain_graph=True)[0].sum(0) for one in every])  # (N, d_out)
    C = data["inputs"].T @ data["inputs"] / TOKENS
    return np.kron(C.numpy(), (dy.T @ dy / TOKENS).numpy())


def cost(fisher: np.ndarray, change: Tensor) -> float:
    """½ vec(ΔW)ᵀ F vec(ΔW)."""
    vector = change.detach().numpy().flatten(order="F")
    return float(vector @ fisher @ vector) / 2


def turn(layers: AdapterLayers, found: dict[str, Balanced]) -> None:
    resize_(layers, {name: LayerPlan(tuple(range(len(one.worth))), basis=one.basis) for name, one in found.items()})


def test_taking_ranks_away_costs_half_their_worth_in_the_quadratic_model() -> None:
    """Each rank by itself, and every set of ranks: their costs add up, as in no other basis."""
    model, layers, layer = one_map()
    fisher = quadratic_model(model)
    update = S * layer.B @ layer.A
    found = balance(layer, measure_gramians(model, layers, [batch()], loss_fn=loss_fn)[layer.name])
    turn(layers, {layer.name: found})
    assert found.worth.tolist() == sorted(found.worth.tolist(), reverse=True)
    assert float(found.worth[-1]) > 0
    for ranks in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        change = -S * layer.B[:, ranks] @ layer.A[ranks]
        assert cost(fisher, change) == pytest.approx(float(found.worth[ranks].sum()) / 2, rel=1e-9)
    assert cost(fisher, update) == pytest.approx(float(found.worth.sum()) / 2, rel=1e-9)


def test_no_other_update_of_lower_rank_costs_less() -> None:
    """Balanced truncation is the best approximation in the metric: Eckart–Young with its square roots."""
    model, layers, layer = one_map()
    fisher = quadratic_model(model)
    update = (S * layer.B @ layer.A).detach()
    found = balance(layer, measure_gramians(model, layers, [batch()], loss_fn=loss_fn)[layer.name])
    turn(layers, {layer.name: found})
    kept = (S * layer.B[:, :2] @ layer.A[:2]).detach()
    least = cost(fisher, kept - update)
    left, values, right = torch.linalg.svd(update)
    by_svd = left[:, :2] * values[:2] @ right[:2]
    assert least < cost(fisher, by_svd - update)
    generator = torch.Generator().manual_seed(4)
    for scale in (1e-3, 1e-2, 0.1):  # the neighbours of rank 2
        for _ in range(20):
            B, A = (
                part + scale * torch.randn(part.shape, generator=generator, dtype=torch.float64)
                for part in (layer.B.detach()[:, :2], layer.A.detach()[:2])
            )
            assert cost(fisher, S * B @ A - update) >= least


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "dora"])
def test_afterwards_both_gramians_are_diagonal_and_their_product_is_the_worth(kind: str) -> None:
    """Measured anew in the new basis. The rows of A have the mean norm that they had (B's columns, in an embedding)."""
    model = {
        "linear": lambda: adapted(tiny_llama()),
        "conv1d": lambda: adapted(tiny_gpt2(), fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]),
        "embedding": lambda: adapted(tiny_llama(), target_modules=["embed_tokens"]),
        "dora": lambda: adapted(tiny_llama(), use_dora=True),
    }[kind]().double()
    layers, batches = find_layers(model), [token_batch(padded=True), token_batch(seed=1)]

    def norms(layer: AdapterLayer) -> Tensor:
        return torch.linalg.vector_norm((layer.B.T if layer.is_embedding else layer.A).detach(), dim=1)

    before = {name: norms(layer) for name, layer in layers.items()}
    found = {name: balance(layers[name], pair) for name, pair in measure_gramians(model, layers, batches).items()}
    turn(layers, found)
    for name, pair in measure_gramians(model, layers, batches).items():
        worth = found[name].worth
        for matrix in (pair.Z, pair.D):
            size = matrix.diagonal().sqrt()
            assert ((matrix - matrix.diagonal().diag()).abs() < 1e-8 * size[:, None] * size).all()
        torch.testing.assert_close(pair.Z.diagonal() * pair.D.diagonal(), worth, rtol=1e-7, atol=0)
        torch.testing.assert_close(norms(layers[name]), before[name].mean().expand(len(worth)), rtol=1e-9, atol=0)


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6), spread=st.floats(1, 1e3))
def test_the_worth_is_the_same_in_every_basis(seed: int, rank: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    Z, D = (part.T @ part for part in torch.randn(2, 2 * rank, rank, generator=generator, dtype=torch.float64).unbind())
    _, _, layer = one_map(rank)
    basis = random_basis(rank, seed, largest=spread)
    other = GramianPair(basis.matrix @ Z @ basis.matrix.T, basis.inverse.T @ D @ basis.inverse)
    assume(float(torch.linalg.cond(other.Z)) < 1 / SMALLEST)  # beyond it, the smallest second moments are raised
    one, two = balance(layer, GramianPair(Z, D)), balance(layer, other)
    torch.testing.assert_close(one.worth, two.worth, rtol=1e-6, atol=1e-9 * float(one.worth[0]))
    product = torch.linalg.eigvals(Z @ D).real.sort(descending=True).values
    torch.testing.assert_close(one.worth, product, rtol=1e-6, atol=1e-9 * float(one.worth[0]))


def test_the_measured_worth_is_the_same_in_every_basis() -> None:
    """And the truncated function is the same."""
    kept = []
    for seed in (None, 0, 1):
        model = adapted(tiny_llama(1)).double().eval()
        layers = find_layers(model)
        if seed is not None:
            resize_(layers, {name: LayerPlan((3, 1, 0, 2), basis=random_basis(4, seed)) for name in layers})
        found = {n: balance(layers[n], pair) for n, pair in measure_gramians(model, layers, [token_batch()]).items()}
        resize_(layers, {name: LayerPlan((0, 1), basis=one.basis) for name, one in found.items()})
        worth = torch.cat([one.worth for one in found.values()])
        with torch.no_grad():
            kept.append((worth, model(**token_batch(seed=5)).logits))
    for worth, logits in kept[1:]:
        torch.testing.assert_close(worth, kept[0][0], rtol=1e-7, atol=0)
        torch.testing.assert_close(logits, kept[0][1], rtol=1e-8, atol=1e-9)


class TestDegenerate:
    def unchanged(self, layers: AdapterLayers, layer: AdapterLayer, pair: GramianPair) -> Balanced:
        update = (layer.B @ layer.A).detach()
        found = balance(layer, pair)
        turn(layers, {layer.name: found})
        torch.testing.assert_close(layer.B @ layer.A, update, rtol=1e-9, atol=1e-9)
        assert layer.A.isfinite().all()
        return found

    @pytest.mark.parametrize("reached", [1, 2])
    def test_inputs_that_reach_few_directions(self, reached: int) -> None:
        model, layers, layer = one_map()
        data = batch()
        data["inputs"][:, reached:] = 0
        pair = measure_gramians(model, layers, [data], loss_fn=loss_fn)[layer.name]
        assert torch.linalg.matrix_rank(pair.Z) == reached
        found = self.unchanged(layers, layer, pair)
        assert (found.worth[reached:] < 1e-6 * found.worth[0]).all()
        assert (found.worth[:reached] > 1e-6 * found.worth[0]).all()

    def test_ranks_that_are_equal(self) -> None:
        _, layers, layer = one_map()
        with torch.no_grad():
            layer.A[1] = layer.A[0]
        C = batch()["inputs"].T @ batch()["inputs"]
        pair = GramianPair((layer.A @ C @ layer.A.T).detach(), (layer.B.T @ layer.B).detach())
        worth = self.unchanged(layers, layer, pair).worth
        assert float(worth[2]) < 1e-6 * float(worth[1])

    def test_no_gradient(self) -> None:
        _, layers, layer = one_map()
        found = self.unchanged(layers, layer, GramianPair(torch.eye(3).double() * 2, torch.zeros(3, 3).double()))
        assert not found.worth.any()

    def test_no_token(self) -> None:
        _, _, layer = one_map()
        zero = torch.zeros(3, 3, dtype=torch.float64)
        found = balance(layer, GramianPair(zero, zero))
        assert not found.worth.any()
        assert torch.equal(found.basis.matrix, torch.eye(3).double())

    def test_one_rank(self) -> None:
        _, layers, layer = one_map(1)
        found = self.unchanged(
            layers, layer, GramianPair(torch.tensor([[4.0]]).double(), torch.tensor([[9.0]]).double())
        )
        assert found.worth.tolist() == pytest.approx([36])

    def test_no_rank(self) -> None:
        model = adapted(tiny_llama(1))
        layers = find_layers(model)
        name = next(iter(layers))
        resize_(layers, {name: LayerPlan(())})
        pairs = measure_gramians(model, layers, [token_batch()])
        found = balance(layers[name], pairs[name])
        assert found.worth.shape == (0,)
        assert found.basis.matrix.shape == (0, 0)

    @pytest.mark.parametrize("which", ["Z", "D"])
    def test_gramians_that_are_not_finite(self, which: str) -> None:
        _, _, layer = one_map()
        pair = GramianPair(torch.eye(3).double(), torch.eye(3).double())
        getattr(pair, which)[1, 1] = torch.nan
        with pytest.raises(NonFiniteError, match="Gramians of linear hold NaN or infinity"):
            balance(layer, pair)


class Processes:
    """A share of two processes, of which the other one has the same values, times ``factor``."""

    index, count = 0, 2

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack([values, values * self.factor])


class TestScorer:
    def start(self, **changes: Any) -> tuple[Context, Any]:
        model = adapted(tiny_llama(1)).double().train()
        layers = find_layers(model)
        layers.gramians = Gramians(layers)
        context = Context(0, TrainingInfo(10), model, layers, **changes)
        return context, BalancedScorer().start(layers, context.run)

    def step(self, context: Context, state: Any, seed: int, *, scale: float = 1.0) -> None:
        (context.model(**token_batch(seed=seed)).loss * scale).backward()
        BalancedScorer().before_step(context, state)

    def scores(self, context: Context, state: Any) -> Tensor:
        return torch.cat(list(BalancedScorer().score(context, state, lambda _: ()).values.values()))

    def test_steps_of_training_score_as_the_same_batches_measured(self) -> None:
        context, state = self.start()
        for seed in range(3):
            self.step(context, state, seed)
        measured = measure_gramians(context.model, context.layers, [token_batch(seed=seed) for seed in range(3)])
        expected = torch.cat([balance(context.layers[name], pair).worth for name, pair in measured.items()])
        torch.testing.assert_close(self.scores(context, state), expected, rtol=1e-9, atol=0)

    def test_accumulated_gradients_score_as_one_batch_does(self) -> None:
        context, state = self.start()
        whole = token_batch(seed=0)
        for rows in torch.arange(4).chunk(2):
            (context.model(**{key: value[rows] for key, value in whole.items()}).loss / 2).backward()
        BalancedScorer().before_step(context, state)
        other, other_state = self.start()
        self.step(other, other_state, 0)
        torch.testing.assert_close(self.scores(context, state), self.scores(other, other_state), rtol=1e-9, atol=0)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0])
    def test_a_step_that_is_not_finite_or_reaches_no_rank_is_left_out(self, scale: float) -> None:
        context, state = self.start()
        self.step(context, state, 0)
        expected = self.scores(context, state)
        self.step(context, state, 1, scale=scale)
        assert float(state["steps"]) == 1
        assert torch.equal(self.scores(context, state), expected)

    def test_the_sums_are_the_mean_over_processes_at_every_step(self) -> None:
        """So that the state of one process, which is all that a checkpoint has, is that of all."""
        context, state = self.start()
        self.step(context, state, 0)
        other, other_state = self.start(share=Processes(3.0))
        self.step(other, other_state, 0)
        for key, value in state.items():
            torch.testing.assert_close(other_state[key], value * (1 if key == "steps" else 2), rtol=1e-12, atol=0)

    def test_without_a_pass_a_batch_is_measured_or_asked_for(self) -> None:
        context, state = self.start()
        with pytest.raises(ValidationBatchError, match=r"attach\(…, validation_batch=batch\)"):
            self.scores(context, state)
        found = self.scores(replace(context, validation_batch=token_batch(rows=16, seed=3)), state)
        halves = [
            {key: value[half] for key, value in token_batch(rows=16, seed=3).items()}
            for half in (slice(8), slice(8, 16))
        ]
        measured = measure_gramians(context.model, context.layers, halves)
        expected = torch.cat([balance(context.layers[name], pair).worth for name, pair in measured.items()])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)

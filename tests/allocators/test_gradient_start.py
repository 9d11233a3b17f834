"""A gradient start: the function stays, directions are the best, ranks are those of a naive twin, within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lorank
from lorank.allocators import Budget, Context, TrainingInfo
from lorank.allocators.gradient_start import gradient_plan
from lorank.errors import AdapterError, BudgetError, ValidationBatchError
from lorank.lora import AdapterLayers, LayerPlan, find_layers, resize_
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from tests.scoring.test_weight_gradient import by_autograd

BATCHES = [token_batch(seed=1), token_batch(seed=2, padded=True)]
MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda **lora: adapted(tiny_llama(), random_B=False, **lora),
    "conv1d": lambda **lora: adapted(
        tiny_gpt2(), random_B=False, fan_in_fan_out=True, target_modules=["c_attn", "c_fc", "c_proj"], **lora
    ),
    "embedding": lambda **lora: adapted(
        tiny_llama(), random_B=False, target_modules=["embed_tokens", "v_proj", "down_proj"], **lora
    ),
    "dora": lambda **lora: adapted(tiny_llama(), random_B=False, use_dora=True, **lora),
    "rslora": lambda **lora: adapted(tiny_llama(), random_B=False, use_rslora=True, **lora),
}


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model.eval()(**token_batch(seed=9)).logits
    return found


def learning(layer: Any) -> tuple[Tensor, Tensor]:
    """The factor with the directions as rows (r, d), and the other one, which is zero at the start."""
    return (layer.B.T, layer.A) if layer.is_embedding else (layer.A, layer.B)


@pytest.mark.parametrize("ranks", ["gradient", "keep"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_function_stays_and_rows_are_orthogonal_and_as_long_as_peft_s(kind: str, ranks: Any) -> None:
    model = MODELS[kind]()
    layers = find_layers(model)
    before = {name: learning(layer)[0].detach().norm(dim=1).mean() for name, layer in layers.items()}
    scalings = {name: layer.scaling for name, layer in layers.items()}
    expected, state = logits(model), torch.get_rng_state()
    returned = lorank.gradient_start_(model, BATCHES, ranks=ranks)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert returned == layers.ranks
    assert ranks == "gradient" or set(returned.values()) == {4}
    assert ranks == "keep" or len(set(returned.values())) > 1
    for name, layer in layers.items():
        rows, other = learning(layer)
        assert not other.any()
        assert layer.scaling == pytest.approx(scalings[name], rel=1e-12)
        gram = (rows @ rows.T).detach()
        torch.testing.assert_close(
            gram, before[name] ** 2 * torch.eye(layer.rank), rtol=1e-4, atol=1e-4 * float(before[name]) ** 2
        )
        assert rows.requires_grad
        assert other.requires_grad


@pytest.mark.parametrize("kind", ["llama", "conv1d", "embedding"])
def test_no_other_directions_give_a_larger_gradient(kind: str) -> None:
    """‖∂L/∂B‖ in evaluation mode, against random orthonormal rows of the same norm."""
    model = MODELS[kind]().double()
    lorank.gradient_start_(model, BATCHES, ranks="keep")
    layers = find_layers(model.eval())

    def gradients() -> dict[str, float]:
        loss = sum(model(**batch).loss for batch in BATCHES) / len(BATCHES)
        others = [learning(layer)[1] for layer in layers.values()]
        found = torch.autograd.grad(loss, others)
        return {name: float(torch.linalg.norm(one)) for name, one in zip(layers, found, strict=True)}

    ours = gradients()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for layer in layers.values():
            weight = layer.B if layer.is_embedding else layer.A
            rows = learning(layer)[0].detach()
            wild = torch.randn(rows.shape[1], rows.shape[0], generator=generator, dtype=rows.dtype)
            rows = torch.linalg.qr(wild).Q.T * rows.norm(dim=1)[0]
            weight.data.copy_(rows.T if layer.is_embedding else rows)
        assert all(ours[name] > value for name, value in gradients().items())


def naive_ranks(layers: AdapterLayers, costs: dict[str, int], limit: float, caps: dict[str, int]) -> dict[str, int]:
    """One rank at a time: always the affordable one with the largest (s σ)² per cost."""
    values = {name: torch.linalg.svdvals(G).tolist() for name, G in by_autograd(layers, BATCHES).items()}
    ranks = dict.fromkeys(layers, 0)
    while True:
        spent = sum(costs[name] * rank for name, rank in ranks.items())
        offers = {
            name: (layers[name].scaling * values[name][rank]) ** 2 / costs[name]
            for name, rank in ranks.items()
            if rank < caps[name] and spent + costs[name] <= limit
        }
        if not offers:
            return ranks
        ranks[max(offers, key=offers.__getitem__)] += 1


@pytest.mark.parametrize(
    "budget",
    [
        None,
        3,
        "31 ranks",
        "1900 params",
        "5% of base",
        {"bytes": 9000},
        "60% of adapter",
        {"ranks_per_module": 3, "max_lora_rank": 4},
    ],
)
def test_ranks_are_those_of_a_naive_twin_and_fit_the_budget(budget: Any) -> None:
    """The twin in float64; where an offer is close to another one, both may differ by it."""
    model = MODELS["llama"](rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 16}).double()
    layers = find_layers(model)
    resolved = Budget.parse("100% of adapter" if budget is None else budget).resolve(layers)
    constraint = resolved.constraints[0]
    expected = naive_ranks(layers, dict(constraint.costs), constraint.limit, dict(resolved.caps))
    found = lorank.gradient_start_(model, BATCHES, budget=budget)
    assert resolved.fits(found)
    assert found == expected
    assert layers.ranks == found


def test_a_module_never_starts_above_four_times_the_mean_rank_or_sixteen() -> None:
    """All the worth is in one module; the others get what it may not hold."""
    model = adapted(tiny_llama(1), random_B=False, r=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    layers = find_layers(model)
    with torch.no_grad():
        layers["model.layers.0.self_attn.o_proj"].module.scaling["default"] = 1e6
    found = lorank.gradient_start_(model, BATCHES, budget="24 ranks")
    assert found["model.layers.0.self_attn.o_proj"] == 24  # 4 × 6


def test_the_start_does_not_depend_on_the_order_of_calls_and_random_states() -> None:
    found = []
    for seed in (0, 1):
        model = MODELS["llama"]()
        torch.manual_seed(seed)
        ranks = lorank.gradient_start_(model, iter(BATCHES), seed=3)
        found.append((ranks, [layer.A.detach() for layer in find_layers(model).values()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_modules_without_a_gradient_begin_as_peft_makes_them() -> None:
    """With ranks="keep", a module that the loss does not depend on has random rows."""
    model = MODELS["llama"]()
    layers = find_layers(model)
    batch = token_batch()

    def loss_fn(model: Any, _: Any) -> Tensor:
        embedded = model.base_model.model.model.embed_tokens(batch["input_ids"])
        first: Tensor = model.base_model.model.model.layers[0].mlp(embedded)
        return first.square().mean()

    lorank.gradient_start_(model, [batch], ranks="keep", loss_fn=loss_fn)
    reached = [name for name, layer in layers.items() if is_orthogonal(layer.A)]
    assert reached == [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert all(layer.A.isfinite().all() and (layer.A.norm(dim=1) > 0).all() for layer in layers.values())


def is_orthogonal(A: Tensor) -> bool:
    gram = A.detach() @ A.detach().T
    return bool(((gram - gram.diagonal().diag()).abs() < 1e-4 * gram.diagonal().max()).all())


def test_a_layer_with_more_ranks_than_directions_keeps_its_rows() -> None:
    """min(d_in, d_out) = 16 for k_proj, which the user gave 20 ranks."""
    model = adapted(tiny_llama(1), random_B=False, r=20, target_modules=["k_proj", "q_proj"])
    layers = find_layers(model)
    k, q = (next(layer for name, layer in layers.items() if f"{letter}_proj" in name) for letter in "kq")
    before = k.A.detach().clone()
    assert set(lorank.gradient_start_(model, BATCHES, ranks="keep").values()) == {20}
    assert torch.equal(k.A, before)
    assert is_orthogonal(q.A)


def test_an_encoder_with_its_own_loss() -> None:
    model = adapted(tiny_bert(), random_B=False, task_type="SEQ_CLS").double()
    ranks = lorank.gradient_start_(model, [class_batch()], budget=2)
    assert sum(ranks.values()) == 2 * len(ranks)


class TestErrors:
    def refused(
        self, error: type[Exception], message: str, model: Any = None, batches: Any = BATCHES, **settings: Any
    ) -> None:
        model = MODELS["llama"]() if model is None else model
        layers = find_layers(model)
        before = {name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in layers.items()}
        with pytest.raises(error, match=message):
            lorank.gradient_start_(model, batches, **settings)
        for name, layer in layers.items():
            assert torch.equal(layer.A, before[name][0])
            assert torch.equal(layer.B, before[name][1])

    def test_a_trained_adapter(self) -> None:
        self.refused(AdapterError, "already has an update", adapted(tiny_llama()))
        self.refused(AdapterError, "embed_tokens already has", adapted(tiny_llama(), target_modules=["embed_tokens"]))

    def test_an_initialisation_that_changed_the_base(self) -> None:
        model = adapted(tiny_llama(), random_B=False, init_lora_weights="pissa")
        self.refused(AdapterError, "gradient_start_", model)

    def test_settings(self) -> None:
        self.refused(BudgetError, "expected 'gradient' or 'keep'", ranks="eva")
        self.refused(BudgetError, "a budget chooses ranks", ranks="keep", budget=3)
        self.refused(BudgetError, "expected 8", budget="many")
        self.refused(BudgetError, "less than the", budget="1 params")

    def test_batches(self) -> None:
        self.refused(ValidationBatchError, "no batch", batches=[])
        self.refused(ValidationBatchError, "labels", batches=[{"input_ids": token_batch()["input_ids"]}])
        self.refused(ValidationBatchError, "is nan, so", loss_fn=lambda m, b: m(**b).loss * math.nan)


class TestPlan:
    """What a run begins with, where layers may be trained already."""

    def plan(self, model: Any, budget: Any, **settings: Any) -> tuple[AdapterLayers, Any]:
        layers = find_layers(model)
        context = Context(0, TrainingInfo(1), model, layers, train_batches=BATCHES)
        return layers, gradient_plan(context, Budget.parse(budget).resolve(layers), **settings)

    @pytest.mark.parametrize("budget", ["200% of adapter", "50% of adapter"])
    def test_trained_ranks_stay_and_further_ones_are_zero(self, budget: str) -> None:
        model = adapted(tiny_llama())
        expected = logits(model)
        layers, plan = self.plan(model, budget)
        before = {name: layer.A.detach().clone() for name, layer in layers.items()}
        resize_(layers, plan)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
        for name, layer in layers.items():
            assert torch.equal(layer.A[:4], before[name])
        assert (layers.total_rank > 4 * len(layers)) == (budget == "200% of adapter")

    def test_without_directions_rows_stay_random(self) -> None:
        model = MODELS["llama"]()
        before = {name: layer.A.detach().clone() for name, layer in find_layers(model).items()}
        layers, plan = self.plan(model, 4, directions=False)
        with_directions = self.plan(model, 4)[1]
        assert {name: one.rank for name, one in plan.items()} == {n: one.rank for n, one in with_directions.items()}
        resize_(layers, plan)
        for name, layer in layers.items():
            kept = min(4, layer.rank)
            assert torch.equal(layer.A[:kept], before[name][:kept])

    def test_layers_at_rank_zero_begin_as_others_do(self) -> None:
        model = MODELS["llama"]()
        empty = "model.layers.0.mlp.down_proj"
        resize_(find_layers(model), {empty: LayerPlan(())})
        layers, plan = self.plan(model, 8)
        resize_(layers, plan)
        assert layers[empty].rank > 0
        torch.testing.assert_close(
            layers[empty].A.norm(dim=1), torch.full((layers[empty].rank,), 1 / math.sqrt(3)), rtol=1e-4, atol=0
        )

"""Resizing without data: best approximations, ranks without effect, and plain PEFT before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lorank
from lorank.errors import AdapterError, BudgetError, PlanError
from lorank.lora import LayerPlan, find_layers, resize_
from lorank.scoring import UpdateSvd, balance
from lorank.scoring.gramians import GramianPair
from tests.models import adapted, tiny_gpt2, tiny_llama, token_batch

BATCH = token_batch()


def updates(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: layer.scaling * (layer.B.detach().double() @ layer.A.detach().double())
        for name, layer in find_layers(model).items()
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**BATCH).logits


def best(update: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


KINDS = pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"use_rslora": True}),
        (tiny_llama, {"use_dora": True}),
        (tiny_llama, {"target_modules": ["embed_tokens", "o_proj"]}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
    ids=["plain", "rslora", "dora", "embedding", "conv1d"],
)
EMBEDDINGS = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT, when it saves


@EMBEDDINGS
@KINDS
def test_every_module_receives_its_best_approximation(make: Any, settings: dict, tmp_path: Path) -> None:
    """And what PEFT loads from the file has the same output."""
    model = adapted(make(), **{"target_modules": ["q_proj", "down_proj"], **settings}).eval()
    before, scalings = updates(model), {name: one.scaling for name, one in find_layers(model).items()}
    assert set(lorank.resize_adapter_(model, rank=2).values()) == {2}
    layers = find_layers(model)
    for name, update in updates(model).items():
        torch.testing.assert_close(update, best(before[name], 2), rtol=1e-4, atol=1e-5)
        assert layers[name].scaling == scalings[name]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    model.train()
    model(**BATCH).loss.backward()
    assert all(layer.A.grad is not None and layer.A.grad.shape == layer.A.shape for layer in layers.values())


@EMBEDDINGS
@KINDS
def test_growing_changes_no_bit_of_the_output(make: Any, settings: dict, tmp_path: Path) -> None:
    model = adapted(make(), **{"target_modules": ["q_proj", "down_proj"], "r": 3, **settings}).eval()
    before = logits(model)
    old = {name: (one.A.detach().clone(), one.B.detach().clone()) for name, one in find_layers(model).items()}
    ranks = lorank.resize_adapter_(model, rank=8)
    assert set(ranks.values()) == {8}
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    for name, layer in find_layers(model).items():
        A, B = old[name]
        assert torch.equal(layer.A[:3], A)
        assert torch.equal(layer.B[:, :3], B)
        zero, drawn = (layer.A[3:], layer.B[:, 3:]) if layer.is_embedding else (layer.B[:, 3:], layer.A[3:])
        assert not zero.any()
        assert drawn.any()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval()), logits(model))


def test_some_modules_grow_and_others_shrink() -> None:
    model = adapted(tiny_llama(), r=4, rank_pattern={"q_proj": 8, "v_proj": 2}, target_modules=["q_proj", "v_proj"])
    before = updates(model)
    lorank.resize_adapter_(model, rank=4)
    for name, update in updates(model).items():
        expected = best(before[name], 4) if "q_proj" in name else before[name]
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_a_budget_keeps_the_largest_parts_of_all_updates_per_number() -> None:
    """The twin decomposes every update as a whole. One module's s is larger, which counts."""
    model = adapted(
        tiny_llama(), target_modules=["q_proj", "v_proj", "down_proj"], alpha_pattern={"layers.1.self_attn.q_proj": 32}
    )
    layers = find_layers(model)
    parts = sorted(
        (
            (float(value) ** 2 / (layers[name].d_in + layers[name].d_out), name)
            for name, update in updates(model).items()
            for value in torch.linalg.svdvals(update)[:4]
        ),
        reverse=True,
    )
    limit, expected, used = layers.parameters // 2, dict.fromkeys(layers, 0), 0
    for _, name in parts:
        cost = layers[name].d_in + layers[name].d_out
        if used + cost <= limit:
            used += cost
            expected[name] += 1
    assert lorank.resize_adapter_(model, budget="50% of adapter") == expected
    assert expected["model.layers.1.self_attn.q_proj"] == 4
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_is_the_least_rank_that_holds_it(energy: float) -> None:
    model = adapted(tiny_llama(), r=8)
    before = updates(model)
    ranks = lorank.resize_adapter_(model, energy=energy)
    for name, update in before.items():
        squares = torch.linalg.svdvals(update)[:8].square()
        shares = (squares.cumsum(0) / squares.sum()).tolist()
        assert ranks[name] == next(k for k in range(1, 9) if shares[k - 1] >= energy)
    assert max(ranks.values()) > 1 or energy == 0.5


def test_all_energy_removes_only_ranks_without_effect() -> None:
    model = adapted(tiny_llama(), r=4, target_modules=["q_proj", "v_proj"]).eval()
    with torch.no_grad():
        for name, layer in find_layers(model).items():
            layer.B[:, 2:] = layer.B[:, :2] if "q_proj" in name else 0
    before = logits(model)
    assert set(lorank.resize_adapter_(model, energy=1).values()) == {2}
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_small_singular_values_keep_their_digits() -> None:
    """Gramians would square them away: 1e-9 of the largest is 1e-18 there. float64 has 16 digits."""
    model = adapted(tiny_llama(), r=3, target_modules=["q_proj"]).double()
    layer = next(iter(find_layers(model).values()))
    exact = torch.tensor([1.0, 1e-4, 1e-9], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(32, 3, generator=draw, dtype=torch.float64)).Q for _ in range(2))
    mix = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        layer.B.copy_(U * exact @ torch.linalg.inv(mix))
        layer.A.copy_(mix @ V.T)
    torch.testing.assert_close(UpdateSvd(layer).values, exact, rtol=1e-5, atol=0)
    pair = GramianPair(layer.A.detach() @ layer.A.detach().T, layer.B.detach().T @ layer.B.detach())
    squares = balance(layer, pair).worth
    torch.testing.assert_close(squares[:2], exact[:2].square(), rtol=1e-4, atol=0)  # the same, where it has digits


@torch.no_grad()
def test_rows_keep_their_mean_norm() -> None:
    model = adapted(tiny_llama(), r=4, target_modules=["q_proj", "embed_tokens"])
    layers = find_layers(model)
    norms = {
        n: float((one.B.norm(dim=0) if one.is_embedding else one.A.norm(dim=1)).mean()) for n, one in layers.items()
    }
    lorank.resize_adapter_(model, rank=2)
    for name, one in layers.items():
        found = one.B.norm(dim=0) if one.is_embedding else one.A.norm(dim=1)
        torch.testing.assert_close(found, torch.full((2,), norms[name]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "give one of rank, budget and energy; given: none"),
        ({"rank": 2, "energy": 0.5}, "given: rank, energy"),
        ({"rank": 0}, "rank=0: expected at least 1"),
        ({"energy": 1.5}, "energy=1.5: expected a share above 0 and at most 1"),
        ({"budget": "100% of adapter"}, "already fits the budget"),
        ({"budget": "many"}, "expected 8 "),
    ],
)
def test_mistakes_in_sizes(sizes: dict, message: str) -> None:
    model = adapted(tiny_llama())
    before = updates(model)
    with pytest.raises(BudgetError, match=message):
        lorank.resize_adapter_(model, **sizes)
    assert all(torch.equal(update, before[name]) for name, update in updates(model).items())


def test_adapters_that_cannot_be_resized() -> None:
    with pytest.raises(AdapterError, match="has no update"):
        lorank.resize_adapter_(adapted(tiny_llama(), random_B=False), energy=0.9)
    with pytest.raises(PlanError, match="can hold at most min"):
        lorank.resize_adapter_(adapted(tiny_llama()), rank=64)
    model = adapted(tiny_llama())
    find_layers(model).learn_gates()
    with pytest.raises(AdapterError, match="is in a run of lorank"):
        lorank.resize_adapter_(model, rank=2)
    model = adapted(tiny_llama())
    with torch.no_grad():
        next(iter(find_layers(model).values())).B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        lorank.resize_adapter_(model, rank=2)


def test_a_module_of_rank_0_comes_back() -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"]).eval()
    layers = find_layers(model)
    resize_(layers, {next(iter(layers)): LayerPlan(())})
    before = logits(model)
    lorank.resize_adapter_(model, rank=4)
    assert set(find_layers(model).ranks.values()) == {4}
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)

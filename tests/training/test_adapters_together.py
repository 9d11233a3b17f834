"""Adapters with moved ranks beside others: weighted sums, hot swaps, and the adapter switched off within a run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

import lorank
from tests.methods import METHODS
from tests.models import adapted, tiny_llama, token_batch

STEPS = 12
TARGETS = ["q_proj", "v_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:.*multiple times.*:UserWarning")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**token_batch(seed=5)).logits
    return found


def trained(method: str, seed: int, *, off: bool = False, **lora: Any) -> tuple[PeftModel, lorank.Ranks]:
    """A run. With ``off``, each step also computes the base model's outputs, with the adapter switched off."""
    model = adapted(tiny_llama(1), random_B=False, target_modules=TARGETS, **lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ranks = lorank.attach(
        model, optimizer, METHODS[method].make(), validation_batch=token_batch(seed=99), total_steps=STEPS
    )
    base = logits(tiny_llama(1))
    while ranks.step < STEPS:
        if off:
            with model.disable_adapter():
                assert torch.equal(logits(model), base)
            model.train()
        model(**token_batch(seed=100 * seed + ranks.step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, ranks


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters whose ranks differ, between modules and from each other."""
    places, found = {}, []
    for seed, (name, method) in enumerate({"first": "alora-first-order", "second": "balanced"}.items()):
        _, ranks = trained(method, seed)
        places[name] = tmp_path_factory.mktemp(name)
        ranks.save_adapter(places[name])
        found.append(ranks.layers.ranks)
    assert found[0] != found[1]
    assert all(len(set(ranks.values())) > 1 for ranks in found)
    return places


def updates(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """s B A of every module of an adapter."""
    return {
        name: layer.module.get_delta_weight(adapter).detach().clone()
        for name, layer in lorank.find_layers(model, adapter).items()
    }


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_a_weighted_sum_is_that_of_the_updates(combination: str, two: dict[str, Path], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(1), two["first"], adapter_name="first")
    model.load_adapter(two["second"], "second")
    more = {"svd_rank": 16} if combination == "svd" else {}
    model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type=combination, **more)
    first, second, both = (updates(model, name) for name in ("first", "second", "both"))
    assert both.keys() == first.keys() | second.keys()
    for name, update in both.items():
        parts = [weight * own[name] for weight, own in ((0.7, first), (0.4, second)) if name in own]
        torch.testing.assert_close(update, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-6)
    model.set_adapter("both")
    live = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "both")
    torch.testing.assert_close(logits(loaded), live, rtol=0, atol=1e-5)


def swap(model: PeftModel, folder: Path) -> None:
    """PEFT's hot swap, without its comparison of the configurations."""
    weights = {
        key.replace(".weight", ".default.weight"): value for key, value in load_peft_weights(str(folder)).items()
    }
    hotswap_adapter_from_state_dict(model, weights, "default", LoraConfig.from_pretrained(folder))


@pytest.mark.parametrize("prepared", [False, True], ids=["as loaded", "padded for a compiled model"])
def test_a_hot_swap_with_other_ranks(prepared: bool, two: dict[str, Path]) -> None:
    """PEFT refuses another alpha_pattern by name; the swap itself, which reads both, is exact."""
    expected = {name: logits(PeftModel.from_pretrained(tiny_llama(1), place)) for name, place in two.items()}
    model = PeftModel.from_pretrained(tiny_llama(1), two["second"])  # has all modules; the first has one at rank 0
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(model, str(two["first"]), "default")
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=16)
    for name in ("first", "second", "first"):
        swap(model, two[name])
        torch.testing.assert_close(logits(model), expected[name], rtol=0, atol=1e-5)


def test_another_adapter_takes_the_place_of_one_with_other_ranks(two: dict[str, Path]) -> None:
    """The way that needs no hot swap."""
    model = PeftModel.from_pretrained(tiny_llama(1), two["first"])
    model.load_adapter(two["second"], "second")
    model.set_adapter("second")
    model.delete_adapter("default")
    expected = logits(PeftModel.from_pretrained(tiny_llama(1), two["second"]))
    assert torch.equal(logits(model), expected)


@functools.cache
def without_interruption(method: str) -> tuple[dict[str, int], Tensor]:
    model, ranks = trained(method, 0, lora_dropout=0.0)
    return ranks.layers.ranks, logits(model)


@pytest.mark.parametrize("method", ["alora-first-order", "ard-heads", "balanced"])
def test_the_adapter_switched_off_within_a_run_is_the_base_model_and_changes_nothing(method: str) -> None:
    model, ranks = trained(method, 0, off=True, lora_dropout=0.0)
    expected, outputs = without_interruption(method)
    assert ranks.layers.ranks == expected
    assert torch.equal(logits(model), outputs)

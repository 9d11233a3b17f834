"""What a loop changes on live layers between two steps stays, or is refused at the next allocation."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

import lorank
from lorank.errors import AdapterError
from tests.methods import METHODS, STEPS
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import QUICK, adamw, run_loop

RESIZING = ["balanced", "alora", "alora-sensi", "alora-dnas", "adalora", "sora", "ard", "ard-heads"]


def trained(method: str, change: Callable[[lorank.Ranks], None], **lora: Any) -> lorank.Ranks:
    """A run in which ``change`` is made after two steps. Plain SGD, which has no state of another dtype."""
    model = adapted(tiny_llama(1), random_B=False, **{**METHODS[method].lora, **lora}).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ranks = lorank.attach(
        model, optimizer, METHODS[method].make(), validation_batch=token_batch(seed=9), total_steps=STEPS
    )
    for seed in range(STEPS):
        if seed == 2:
            change(ranks)
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks.detach()
    return ranks


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch(seed=5)).logits.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", RESIZING)
def test_another_dtype(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    ranks = trained(method, lambda ranks: ranks.layers.model.to(dtype))
    layers = ranks.layers
    assert {weight.dtype for layer in layers.values() for weight in (layer.A, layer.B)} == {dtype}
    layers.model.save_pretrained(tmp_path)
    base = tiny_llama(1).to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert lorank.find_layers(loaded).ranks == {name: rank for name, rank in layers.ranks.items() if rank}
    assert (logits(loaded) - logits(layers.model)).abs().max() <= 1e-6


@pytest.mark.parametrize("method", ["alora", "sora", "ard-heads"])
def test_a_scaling_that_the_user_sets_stays_and_the_file_has_alpha_as_in_peft(tmp_path: Path, method: str) -> None:
    ranks = trained(method, lambda ranks: [x.module.set_scale("default", 3) for x in ranks.layers.values()])
    layers = ranks.layers
    assert len(set(layers.ranks.values())) > 1
    assert [layer.module.scaling["default"] for layer in layers.values()] == [6.0] * len(layers)
    changed = logits(layers.model)
    layers.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path)
    with_ranks = [layer for layer in layers.values() if layer.rank]
    for layer in with_ranks:
        layer.module.unscale_layer()  # PEFT: back to what alpha states
        assert layer.scaling == pytest.approx(2.0, rel=1e-12)
    assert (logits(loaded) - logits(layers.model)).abs().max() <= 1e-6
    for layer in lorank.find_layers(loaded).values():
        layer.module.set_scale("default", 3)
    assert (logits(loaded) - changed).abs().max() <= 1e-6


def test_an_alpha_that_the_user_sets_stays(tmp_path: Path) -> None:
    def double(ranks: lorank.Ranks) -> None:
        for layer in ranks.layers.values():
            layer.module.lora_alpha["default"] *= 2
            layer.module.scaling["default"] *= 2

    layers = trained("alora", double).layers
    assert {layer.scaling for layer in layers.values()} == {4.0}
    layers.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path)
    assert {layer.scaling for layer in lorank.find_layers(loaded).values()} == {4.0}
    assert (logits(loaded) - logits(layers.model)).abs().max() <= 1e-6


@pytest.mark.parametrize("method", ["alora", "adalora", "sora", "ard-heads"])
def test_frozen_weights_another_dropout_the_mode_and_gradient_checkpointing_stay(method: str) -> None:
    def change(ranks: lorank.Ranks) -> None:
        for layer in ranks.layers.values():
            layer.A.requires_grad_(False)
            layer.module.lora_dropout["default"] = torch.nn.Dropout(0.3)
        ranks.layers.model.eval()
        ranks.layers.model.activation_checkpointing_enable({"use_reentrant": False})

    layers = trained(method, change).layers
    assert not any(layer.A.requires_grad for layer in layers.values())
    assert all(layer.B.requires_grad for layer in layers.values())
    assert {layer.module.lora_dropout["default"].p for layer in layers.values()} == {0.3}
    assert not layers.model.training
    assert layers.model.is_activation_checkpointing


def another_adapter(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")


UNUSED = {
    "another adapter": (another_adapter, lambda model: model.set_adapter("default"), r"is not active .*active: other"),
    "disabled": (
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        "is disabled",
    ),
    "merged": (lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter(), "is merged"),
}


@pytest.mark.parametrize("case", UNUSED)
def test_an_adapter_that_the_forward_pass_does_not_use_is_refused(case: str) -> None:
    stop_using, use_again, message = UNUSED[case]
    model = adapted(tiny_llama(1))
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(seed=9), total_steps=6)
    for seed in range(2):
        model(**token_batch(seed=seed)).loss.backward()
        if seed == 1:
            stop_using(model)
            before = ranks.layers.ranks
            with pytest.raises(AdapterError, match=message):
                optimizer.step()
            assert ranks.layers.ranks == before
            use_again(model)
        else:
            optimizer.step()
        optimizer.zero_grad()
    for seed in range(2, 6):
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks.detach()
    assert len(ranks.history.allocations) > 0


@pytest.mark.parametrize("case", UNUSED)
def test_such_an_adapter_is_refused_at_attach_too(case: str) -> None:
    stop_using, _, message = UNUSED[case]
    model = adapted(tiny_llama(1))
    optimizer = adamw(model)
    stop_using(model)
    with pytest.raises(AdapterError, match=message):
        lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=6, adapter="default")


@functools.cache
def straight_and_saved() -> tuple[list[float], dict[str, int], dict[str, Any]]:
    """The losses and the ranks of a run of 10 steps, and what it saves after 5."""
    losses, ranks, _ = run_loop(range(10), None, None)
    return losses, ranks.layers.ranks, run_loop(range(5), None, 5)[2]


@pytest.mark.parametrize("order", list(itertools.permutations(["attach", "model", "optimizer"])), ids=" ".join)
def test_attach_comes_before_the_weights_and_else_the_order_is_free(order: tuple[str, ...]) -> None:
    straight, ranks, saved = straight_and_saved()
    torch.manual_seed(5)
    model = adapted(tiny_llama(), random_B=False, lora_dropout=0.1)
    optimizer = adamw(model)
    resumed = None
    for what in order:
        if what == "attach":
            resumed = lorank.attach(
                model, optimizer, QUICK, validation_batch=token_batch(seed=99), total_steps=10, seed=3
            )
        elif what == "optimizer":
            optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # PyTorch keeps its tensors
        elif resumed is None:
            with pytest.raises(RuntimeError, match="size mismatch"):  # PyTorch's own check: nothing is silently wrong
                model.load_state_dict(saved["model"], strict=False)
            return
        else:
            model.load_state_dict(saved["model"], strict=False)
    torch.set_rng_state(saved["rng"])
    losses = []
    for step in range(5, 10):
        loss = model(**token_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == straight[5:]
    assert resumed.layers.ranks == ranks

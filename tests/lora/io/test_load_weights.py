"""Weights of other ranks load into a live model, whoever loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorank.lora import LayerPlan, find_layers, resize_, resize_on_load
from tests.models import adapted, tiny_llama, token_batch


@pytest.mark.parametrize("target_modules", ["all-linear", ["embed_tokens", "q_proj", "v_proj"]])
def test_load_adapter_takes_the_ranks_of_the_file(tmp_path: Path, target_modules) -> None:
    saved = adapted(tiny_llama(), target_modules=target_modules).eval()
    layers = find_layers(saved)
    names = list(layers)
    resize_(layers, {names[0]: LayerPlan(()), names[1]: LayerPlan((0, 1, 2, 3), 5), names[2]: LayerPlan((3,))})
    with torch.no_grad():
        for layer in layers.values():
            layer.B.add_(0.01)
        expected = saved(**token_batch()).logits
    saved.save_pretrained(tmp_path)

    live = adapted(tiny_llama(), random_B=False, target_modules=target_modules).eval()
    live_layers = find_layers(live)
    # Two modules are at rank 0 here, one of them with ranks in the file.
    resize_(live_layers, {names[1]: LayerPlan(()), names[-1]: LayerPlan(())})
    handle = resize_on_load(live_layers)
    live.load_adapter(tmp_path, "default", is_trainable=True)
    assert live_layers.ranks == layers.ranks
    with torch.no_grad():
        assert torch.equal(live(**token_batch()).logits, expected)
    assert live.peft_config["default"].rank_pattern == saved.peft_config["default"].rank_pattern
    handle.remove()
    resize_(live_layers, {names[2]: LayerPlan((0,), 2)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        live.load_adapter(tmp_path, "default", is_trainable=True)


def test_a_whole_state_dict_loads_strictly_with_a_module_at_rank_0() -> None:
    saved, live = adapted(tiny_llama()), adapted(tiny_llama(), random_B=False)
    layers, live_layers = find_layers(saved), find_layers(live)
    resize_(layers, {next(iter(layers)): LayerPlan(())})
    resize_on_load(live_layers)
    live.load_state_dict(saved.state_dict(), strict=True)
    assert live_layers.ranks == layers.ranks


def test_weights_about_something_else_change_no_rank() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    resize_on_load(layers)
    model.load_state_dict({}, strict=False)
    assert set(layers.ranks.values()) == {4}


def test_the_optimisers_state_follows() -> None:
    model = adapted(tiny_llama())
    layers = find_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model(**token_batch()).loss.backward()
    optimizer.step()
    resize_on_load(layers, optimizer)
    other = adapted(tiny_llama(), r=6)
    model.load_state_dict(other.state_dict(), strict=False)
    for layer in layers.values():
        assert optimizer.state[layer.A]["exp_avg"].shape == layer.A.shape == (6, layer.d_in)
    optimizer.zero_grad()
    model(**token_batch()).loss.backward()
    optimizer.step()

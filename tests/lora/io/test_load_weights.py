"""Weights of other ranks load into a live model, whoever loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorank.errors import AdapterError
from lorank.lora import LayerPlan, find_layers, plan_for_heads, resize_, resize_on_load, save_adapter
from tests.lora.forms import OUT, TARGETS, Q, gated, in_heads, logits, plain_and_reserved
from tests.lora.optimizers import train_step
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


def test_loading_the_live_weights_keeps_gates_and_others_bring_gates_of_one() -> None:
    model, layers, gates = gated()
    calls: list[int] = []
    resize_on_load(layers, on_new_weights=lambda: calls.append(1))
    own = {key: value.clone() for key, value in model.state_dict().items()}
    values, B = gates.values.clone(), {name: layer.B.detach().clone() for name, layer in layers.items()}
    model.load_state_dict(own)
    assert not calls
    assert torch.equal(layers.gates.values, values)
    assert all(torch.equal(layer.B, B[name]) for name, layer in layers.items())

    key = next(key for key in own if "lora_B" in key)
    model.load_state_dict({**own, key: own[key] + 1})
    assert calls
    assert torch.equal(layers.gates.values, torch.ones_like(values))
    for name, layer in layers.items():  # the folded weights, as they were in the dictionary
        saved = own[f"base_model.model.{name}.lora_B.default.weight"]
        assert torch.equal(layer.B, saved + 1 if name in key else saved)


@pytest.mark.parametrize("gated", [True, False])
def test_weights_of_the_same_layers_load_bitwise(gated: bool) -> None:
    model, layers, _ = in_heads()
    if gated:
        layers.learn_gates(torch.linspace(0.5, 1.5, layers.total_rank))
    resize_on_load(layers)
    before = {name: (x.A.data.clone(), x.B.data.clone(), x.head_ranks) for name, x in layers.items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    resize = {Q: plan_for_heads(layers[Q].head_ranks, [1, 3, 0, 2])} if not gated else {}
    resize_(layers, resize)
    model.load_state_dict(weights)
    for name, (A, B, ranks) in before.items():
        assert torch.equal(layers[name].A, A)
        assert torch.equal(layers[name].B, B)
        assert layers[name].head_ranks == ranks


def test_weights_of_other_ranks_change_the_head_ranks() -> None:
    model, layers, optimizer = in_heads()
    other, others, _ = in_heads()
    resize_(others, {Q: plan_for_heads((2, 2, 2, 2), (1, 0, 4, 2)), OUT: plan_for_heads((2, 2, 2, 2), (0, 0, 3, 1))})
    others[Q].B.data[:, 3:5] = torch.rand(8, 2)  # the new ranks of head 2 trained a little
    train_step(model, optimizer, token_batch())
    resize_on_load(layers, optimizer)
    model.load_state_dict(other.state_dict())
    assert layers[Q].head_ranks == (1, 0, 4, 2)
    assert layers[OUT].head_ranks == (0, 0, 3, 1)
    assert torch.equal(logits(model), logits(other))
    train_step(model.train(), optimizer, token_batch())


def test_weights_that_are_not_per_head_are_refused() -> None:
    model, layers, _ = in_heads()
    resize_on_load(layers)
    plain = adapted(tiny_llama(), target_modules=TARGETS, r=8)
    with pytest.raises(AdapterError, match="do not have this form"):
        model.load_state_dict(plain.state_dict())


def test_weights_of_other_ranks_fill_the_pool(tmp_path: Path) -> None:
    plain, roomy = plain_and_reserved()
    layers = find_layers(plain)
    ranks = dict(zip(layers, [0, 1, 2, 3, 5, 6, 7] * 2, strict=True))
    plan = {name: LayerPlan(tuple(range(min(4, rank))), max(0, rank - 4)) for name, rank in ranks.items()}
    resize_(layers, plan)
    for layer in layers.values():
        torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(layer.rank))
    handle = resize_on_load(find_layers(roomy))
    roomy.load_state_dict(plain.state_dict())
    handle.remove()
    assert find_layers(roomy).ranks == ranks
    batch = token_batch()
    assert torch.allclose(plain(**batch).logits, roomy(**batch).logits, atol=1e-14, rtol=0)
    save_adapter(find_layers(roomy), tmp_path / "roomy")
    saved = load_file(tmp_path / "roomy" / "adapter_model.safetensors")
    assert sorted(len(value) for key, value in saved.items() if "lora_A" in key) == sorted(
        r for r in ranks.values() if r
    )

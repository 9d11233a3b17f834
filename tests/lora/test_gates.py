"""Learned gates: one tensor of values, one of gradients; files and resizes see plain LoRA."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from lorank.lora import LayerPlan, find_layers, fold_gates_, resize_, resize_on_load, save_adapter
from tests.models import adapted, tiny_llama, token_batch


def gated(seed: int = 0):
    model = adapted(tiny_llama()).double()
    layers = find_layers(model)
    values = torch.rand(layers.total_rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return model, layers, layers.learn_gates(values)


def test_gradients_of_all_gates_arrive_in_one_tensor() -> None:
    model, layers, gates = gated()
    model(**token_batch()).loss.backward()
    # the twin: ∂L/∂g_r = Σ_j B_jr ∂L/∂B_jr / g_r, since the loss sees B and g only as B diag(g)
    expected = torch.cat([(layer.B * layer.B.grad).sum(0) / layer.gate for layer in layers.values()])
    torch.testing.assert_close(gates.grad, expected.detach(), rtol=1e-10, atol=1e-14)
    before = gates.grad.clone()
    model(**token_batch()).loss.backward()
    torch.testing.assert_close(gates.grad, 2 * before, rtol=1e-10, atol=1e-14)
    gates.clear_grad()
    assert all(float(leaf.grad.abs().sum()) == 0 for leaf in gates.leaves.values())


def test_values_change_all_layers_at_once() -> None:
    _, layers, gates = gated()
    gates.values.mul_(2)
    for name, layer in layers.items():
        assert torch.equal(layer.gate, gates.leaves[name])
    assert torch.equal(torch.cat([layer.gate.detach() for layer in layers.values()]), gates.values)


def test_frozen_gates_get_no_gradient() -> None:
    model, _, gates = gated()
    gates.freeze()
    model(**token_batch()).loss.backward()
    assert not gates.grad.any()
    gates.freeze(False)
    model(**token_batch()).loss.backward()
    assert gates.grad.all()


def test_a_resize_moves_the_values_and_keeps_the_views() -> None:
    model, layers, gates = gated()
    name = "model.layers.0.self_attn.q_proj"
    values = layers[name].gate.detach().clone()
    resize_(layers, {name: LayerPlan((2, 0), 3)})
    assert layers.gates is not gates
    assert layers[name].gate.tolist() == [values[2], values[0], 1, 1, 1]
    model(**token_batch()).loss.backward()
    assert layers.gates.grad.shape == (layers.total_rank,)
    assert layers.gates.grad.count_nonzero() == layers.total_rank - 3  # B = 0 beneath the new ones


def test_what_is_saved_has_the_gates_folded_and_the_live_model_keeps_them(tmp_path: Path) -> None:
    model, layers, gates = gated()
    model.eval()
    with torch.no_grad():
        logits = model(**token_batch()).logits
    B = {name: layer.B.detach().clone() for name, layer in layers.items()}
    model.save_pretrained(tmp_path / "theirs")  # nobody has to call ours
    save_adapter(layers, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        plain = PeftModel.from_pretrained(tiny_llama().double(), tmp_path / folder).double().eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(**token_batch()).logits, logits, rtol=1e-6, atol=1e-6)
    assert layers.gates is gates
    assert all(torch.equal(layer.B, B[name]) for name, layer in layers.items())
    fold_gates_(layers)
    assert layers.gates is None
    with torch.no_grad():
        torch.testing.assert_close(model(**token_batch()).logits, logits, rtol=1e-10, atol=1e-12)


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

"""Learned gates: one tensor of values, one of gradients; a resize moves both."""

from __future__ import annotations

import torch

from lorank.lora import LayerPlan, resize_
from tests.lora.forms import gated
from tests.models import token_batch


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

"""The gated forward is the formula, with one gate for all samples or one per sample, and is never merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorank.errors import AdapterError
from lorank.lora import find_layers, fold_gates_
from lorank.lora.variants.gated import expand_gate, fold_gate
from tests.models import adapted, tiny_bert, tiny_gpt2, tiny_llama, token_batch


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"target_modules": ["embed_tokens", "v_proj"]}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        (tiny_bert, {"task_type": "SEQ_CLS"}),
        (tiny_llama, {"use_rslora": True}),
    ],
    ids=["linear", "embedding", "conv1d", "bert", "rslora"],
)
def test_the_gated_forward_is_the_formula(make, lora) -> None:
    """y = W x + s B (g ⊙ A x): a gate equals the same factors folded into B, and a gate of ones changes nothing."""
    model = adapted(make(), **lora).double().eval()
    batch = token_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    layers = find_layers(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        plain = model(**inputs).logits
        for layer in layers.values():
            layer.gate = torch.ones(layer.rank)
        assert torch.equal(model(**inputs).logits, plain)
        for layer in layers.values():
            layer.gate = torch.rand(layer.rank, generator=generator, dtype=torch.float64)
        gated = model(**inputs).logits
        assert not torch.allclose(gated, plain)
        fold_gates_(layers)
        folded = model(**inputs).logits
    assert all(layer.gate is None and not layer.module.lora_variant for layer in layers.values())
    torch.testing.assert_close(gated, folded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=["linear", "embedding"])
def test_a_gate_per_sample_is_each_samples_own_gate(lora) -> None:
    model = adapted(tiny_llama(), **lora).double().eval()
    batch = token_batch(rows=3)
    layers = find_layers(model)
    gates = {
        name: torch.rand(3, layer.rank, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, (name, layer) in enumerate(layers.items())
    }
    with torch.no_grad():
        for name, layer in layers.items():
            layer.gate = gates[name]
        together = model(input_ids=batch["input_ids"]).logits
        for row in range(3):
            for name, layer in layers.items():
                layer.gate = gates[name][row]
            alone = model(input_ids=batch["input_ids"][row : row + 1]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_a_learned_gate() -> None:
    model = adapted(tiny_llama()).double()
    layers = find_layers(model)
    layer = layers["model.layers.0.self_attn.q_proj"]
    layer.gate = nn.Parameter(torch.ones(4, dtype=torch.float64))
    model(**token_batch()).loss.backward()
    assert layer.gate.grad is not None
    assert (layer.gate.grad != 0).all()
    # At g = 1 the gate's gradient is Σ B ⊙ ∂L/∂B over each column: the same product, seen from its other factor.
    torch.testing.assert_close(layer.gate.grad, (layer.B * layer.B.grad).sum(0))


def test_a_gate_is_expanded_to_the_axes_of_its_input() -> None:
    z = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
    for sample in range(6):
        torch.testing.assert_close((z * expand_gate(gate, z))[sample], z[sample] * gate[sample].double())
        torch.testing.assert_close((z * expand_gate(gate[0], z))[sample], z[sample] * gate[0].double())
    assert expand_gate(gate, z).dtype == z.dtype


def test_a_gate_per_sample_is_repeated_for_the_flattened_tokens_of_its_sample() -> None:
    gate = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert expand_gate(gate, torch.zeros(6, 2)).tolist() == [[1, 2]] * 3 + [[3, 4]] * 3


def test_ranks_without_a_gate_are_dead() -> None:
    """With a pool, the input also has the ranks that are only reserved."""
    assert expand_gate(torch.ones(2), torch.zeros(5, 4)).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("shape", [(5, 2), (4, 3, 2)])
def test_gates_for_another_number_of_samples_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="gates for 2 samples do not fit an input of shape"):
        expand_gate(torch.ones(2, 2), torch.zeros(shape))


def test_folding_multiplies_each_column_by_its_gate() -> None:
    B, gate = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0, 0.0, -1.0])
    assert torch.equal(fold_gate(B, gate), torch.stack([B[:, i] * gate[i] for i in range(3)], dim=1))


def test_a_gate_per_sample_cannot_be_folded() -> None:
    with pytest.raises(AdapterError, match=r"a gate per sample, shape \(2, 3\), cannot be folded"):
        fold_gate(torch.ones(4, 3), torch.ones(2, 3))

"""DoRA under a gate: PEFT's own where the gate is one, and the folded adapter's where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lorank.errors import PlanError
from lorank.lora import LayerPlan, find_layers, fold_gates_, resize_
from lorank.scoring import ablation_scores
from tests.models import adapted, class_batch, tiny_bert, tiny_gpt2, tiny_llama, token_batch

MODELS = {
    "llama": (tiny_llama, token_batch, {}),
    "bert": (tiny_bert, class_batch, {}),
    "gpt2": (tiny_gpt2, token_batch, {"fan_in_fan_out": True}),
}


def dora(make, **lora):
    model = adapted(make(), use_dora=True, **lora).double()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # as if it had been trained
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    return model, find_layers(model)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_gates_of_one_equal_peft_forward_and_backward(name) -> None:
    make, batch, settings = MODELS[name]
    model, layers = dora(make, **settings)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        loss = model(**batch()).loss
        return loss, torch.autograd.grad(loss, parameters)

    expected_loss, expected = gradients()
    gates = layers.learn_gates()
    loss, found = gradients()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-13)
    model(**batch()).loss.backward()
    assert gates.grad.count_nonzero() == layers.total_rank
    layers.drop_gates()
    assert all(type(layer.module.lora_variant["default"]).__name__.startswith("Dora") for layer in layers.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_gate_equals_the_folded_gate_also_in_the_norm(name) -> None:
    make, batch, settings = MODELS[name]
    model, layers = dora(make, **settings)
    model.eval()
    layers.learn_gates(torch.rand(layers.total_rank, generator=torch.Generator().manual_seed(1)).double())
    gated = logits(model, batch())
    fold_gates_(layers)
    torch.testing.assert_close(logits(model, batch()), gated, rtol=1e-10, atol=1e-12)


def test_dropout_reaches_the_base_part_as_in_peft() -> None:
    model, layers = dora(tiny_llama, lora_dropout=0.3)
    model.train()
    torch.manual_seed(5)
    expected = logits(model, token_batch())
    layers.learn_gates()
    torch.manual_seed(5)
    torch.testing.assert_close(logits(model, token_batch()), expected, rtol=1e-10, atol=1e-12)


def test_a_gate_per_sample_equals_each_sample_alone() -> None:
    model, layers = dora(tiny_llama)
    model.eval()
    layer = layers["model.layers.1.self_attn.v_proj"]
    batch = token_batch()
    per_sample = torch.rand(4, layer.rank, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer.gate = per_sample
    together = logits(model, batch)
    for i in range(4):
        layer.gate = per_sample[i]
        alone = logits(model, {key: value[i : i + 1] for key, value in batch.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-12)


def test_scores_of_the_exact_engine_equal_the_reference() -> None:
    model, layers = dora(tiny_llama)
    exact = ablation_scores(model, layers, token_batch(padded=True), engine="exact")
    naive = ablation_scores(model, layers, token_batch(padded=True), engine="reference")
    assert exact.engine == "exact"
    for name, scores in naive.scores.items():
        torch.testing.assert_close(exact.scores[name], scores, rtol=1e-5, atol=1e-6)


def test_embeddings() -> None:
    model, layers = dora(tiny_llama, target_modules=["embed_tokens", "q_proj"])
    model.eval()
    plain = logits(model, token_batch())
    layers.learn_gates()
    torch.testing.assert_close(logits(model, token_batch()), plain, rtol=1e-12, atol=1e-14)
    layers.gates.values.copy_(torch.rand(layers.total_rank, generator=torch.Generator().manual_seed(1)))
    gated = logits(model, token_batch())
    fold_gates_(layers)
    torch.testing.assert_close(logits(model, token_batch()), gated, rtol=1e-10, atol=1e-12)


def test_a_resized_adapter_reloads_with_its_magnitudes(tmp_path: Path) -> None:
    model, layers = dora(tiny_llama)
    model.eval()
    names = list(layers)
    resize_(layers, {names[0]: LayerPlan((1,)), names[1]: LayerPlan((0, 1, 2, 3), 2)})
    expected = logits(model, token_batch())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().double(), tmp_path).double().eval()
    torch.testing.assert_close(logits(loaded, token_batch()), expected, rtol=1e-6, atol=1e-6)


def test_the_last_rank_cannot_be_removed() -> None:
    _, layers = dora(tiny_llama)
    name = next(iter(layers))
    assert layers[name].min_rank == 1
    with pytest.raises(PlanError, match="uses DoRA"):
        resize_(layers, {name: LayerPlan(())})
    assert layers[name].rank == 4

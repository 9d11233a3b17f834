"""EVA's initial A holds the principal components of a module's inputs, without padding and prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayers, find_layers
from lorank.lora.eva import eva_components
from tests.models import adapted, tiny_llama, token_batch


def components(layers: AdapterLayers, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With every cap at its rank: each module receives the components that it has ranks for."""
    return eva_components(layers, [batch], layers.ranks, layers.ranks)


def batch_with_prompt() -> dict[str, Tensor]:
    batch = token_batch(rows=8, padded=True)
    batch["labels"][:, :3] = -100
    return batch


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")  # PEFT's advice on memory
def test_components_are_those_of_a_singular_value_decomposition() -> None:
    layers = find_layers(adapted(tiny_llama(), random_B=False, target_modules=["q_proj", "down_proj"]))
    batch = batch_with_prompt()
    inputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.module.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    with torch.no_grad():
        layers.model.eval()(**batch)
    counted = (batch["attention_mask"] == 1) & (batch["labels"] != -100)  # (n, tokens)
    found = components(layers, batch)
    assert found.keys() == layers.keys()
    for name, A in found.items():
        rows = inputs[name][counted].double()  # (rows, d_in)
        expected = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:4]  # (r, d_in)
        best, explained = ((rows - rows.mean(0)) @ V.T for V in (expected, A.double()))  # (rows, r)
        # PEFT adds up truncated decompositions until they have converged: nearly the largest variance.
        assert 0.99 * best.square().sum() < explained.square().sum() <= best.square().sum() * (1 + 1e-6)


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")
def test_the_model_and_its_modes_are_unchanged() -> None:
    model = adapted(tiny_llama(), random_B=False, target_modules=["q_proj"], lora_dropout=0.5).train()
    layers = find_layers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    components(layers, token_batch(rows=8))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert layers.config.init_lora_weights is True


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")
def test_an_embedding_receives_nothing() -> None:
    layers = find_layers(adapted(tiny_llama(), random_B=False, target_modules=["embed_tokens", "q_proj"]))
    assert list(components(layers, token_batch(rows=8))) == [name for name in layers if "q_proj" in name]


def test_a_batch_whose_counted_inputs_are_too_few_is_refused() -> None:
    layers = find_layers(adapted(tiny_llama(), random_B=False, target_modules=["q_proj"]))
    batch = token_batch(rows=1)
    batch["labels"][:, :7] = -100
    with pytest.raises(ValidationBatchError, match=r"EVA needs 4 inputs of .*q_proj.*batch 0 has only 3 without"):
        components(layers, batch)

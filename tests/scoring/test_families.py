"""Scores of many families of models, compared with plain forward passes over the whole batch with its labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from lorank.lora import AdapterLayers, find_layers
from lorank.scoring import ablation_scores, first_order_scores, screened_scores
from lorank.scoring.preserve_state import preserve_state
from tests.messages import warnings_of_lorank
from tests.scoring.families import FAMILIES, Family

# In these families a forward pass without labels fails, or gives other logits.
ONLY_WITH_LABELS = ["M2M100", "Whisper", "Speech2Text", "Pix2Struct", "FSMT", "teacher forcing", "module of one's own"]
# Their loss is not a mean cross-entropy over the labels of the batch, so a batch cannot be split.
ONLY_WHOLE = ["regression", "question answering", "tuples, question answering"]


def adapt(family: Family) -> tuple[PeftModel, AdapterLayers]:
    model = get_peft_model(family.make(), LoraConfig(r=2, lora_alpha=4, target_modules=family.modules))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model, find_layers(model)


def plain_loss(output: Any) -> Tensor:
    loss: Tensor = output[0] if isinstance(output, tuple) else output["loss"]
    return loss


def slow_estimates(model: PeftModel, layers: AdapterLayers, batch: dict[str, Tensor]) -> Tensor:
    """[L(M) − g] − L(M) − [L(base) + g₀] for every rank, (R,), from two plain passes over the whole batch."""
    losses, gradients = [], []
    with preserve_state(model, layers), torch.enable_grad():
        for t in (1.0, 0.0):
            leaves = [torch.full((layer.rank,), t).requires_grad_() for layer in layers.values()]
            for layer, leaf in zip(layers.values(), leaves, strict=True):
                layer.gate = leaf
            loss = plain_loss(model(**batch))
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
            losses.append(loss.detach())
            gradients.append(torch.cat([torch.zeros(2) if g is None else g for g in found]))
    return -gradients[0] - (losses[1] + gradients[1])


def flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(scores.values())).float()


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_estimates_are_those_of_plain_passes_with_labels(name: str) -> None:
    model, layers = adapt(FAMILIES[name])
    batch = FAMILIES[name].batch(6)
    expected = slow_estimates(model, layers, batch)
    with warnings_of_lorank() as heard:
        whole, split = (first_order_scores(model, layers, batch, max_rows=rows) for rows in (None, 2))
    torch.testing.assert_close(flat(whole.scores), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(flat(split.scores), expected, rtol=0, atol=1e-5)
    assert bool(split.notice) == bool(heard) == (name in ONLY_WHOLE and "labels" in batch)


@pytest.mark.parametrize("name", [*ONLY_WITH_LABELS, "tuples", "LED"])
def test_exact_and_screened_scores_are_those_of_plain_passes_with_labels(name: str) -> None:
    model, layers = adapt(FAMILIES[name])
    batch = FAMILIES[name].batch(4)
    reference = ablation_scores(model, layers, batch, engine="reference")
    exact = ablation_scores(model, layers, batch)
    screened = screened_scores(model, layers, batch, lambda scores: [(n, k) for n in layers for k in range(2)])
    torch.testing.assert_close(flat(exact.scores), flat(reference.scores), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat(screened.scores), flat(reference.scores), rtol=0, atol=1e-5)

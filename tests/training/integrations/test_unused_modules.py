"""Modules that the loss does not depend on are named once, after some steps, for every method that moves ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import lorank
from tests.messages import warnings_of_lorank
from tests.methods import METHODS
from tests.models import VOCABULARY, adapted, tiny_llama, token_batch

STEPS = 12


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Of the tokens' vectors: BERT's pooler, which ``all-linear`` adapts too, is computed for nothing."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return (hidden[..., 0] - 1).square().mean()


def run(method: str, model: nn.Module, loss: Any) -> list[str]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with warnings_of_lorank() as heard:
        ranks = lorank.attach(
            model,
            optimizer,
            METHODS[method].make(),
            validation_batch=token_batch(seed=9),
            total_steps=STEPS,
            loss_fn=loss,
        )
        while ranks.step < STEPS:
            loss(model, token_batch(seed=ranks.step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [message for message in heard if "no gradient" in message]


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    return adapted(BertModel(config), random_B=False, target_modules=["query", "value", "dense"])


@pytest.mark.parametrize("method", ["ard", "ard-heads"])
def test_a_module_that_is_computed_for_nothing_is_named_once(method: str) -> None:
    (message,) = run(method, bert(), loss_of)
    assert message.startswith("1 of 6 adapted modules have had no gradient until step 10 (pooler.dense)")
    assert "Leave these modules out of target_modules" in message


@pytest.mark.parametrize("method", ["balanced", "sora"])
def test_a_method_that_takes_all_its_ranks_away_needs_no_warning(method: str) -> None:
    model = bert()
    assert not run(method, model, loss_of)
    assert lorank.find_layers(model).ranks["pooler.dense"] == 0


def test_nothing_is_said_where_every_module_is_trained_or_no_rank_moves() -> None:
    assert not run("sora", adapted(tiny_llama(1), random_B=False), lambda model, batch: model(**batch).loss)
    assert not run("static", bert(), loss_of)

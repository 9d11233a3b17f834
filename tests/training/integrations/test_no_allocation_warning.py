"""A run without any allocation is warned of once: before it, if the schedule shows it, or else at its end."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import lorank
from tests.messages import warnings_of_lorank
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import QUICK, adamw


@pytest.fixture
def messages() -> Iterator[list[str]]:
    gc.collect()  # runs that other tests dropped have had their last word
    with warnings_of_lorank() as heard:
        yield heard


def test_a_schedule_without_allocations_is_warned_of_at_once(messages: list[str]) -> None:
    model = adapted(tiny_llama())
    method = lorank.ALoRA(k1=10, unit="steps")
    ranks = lorank.attach(model, adamw(model), method, validation_batch=token_batch(), total_steps=10)
    ranks.detach()
    (message,) = messages
    assert "ALoRA will not move a single rank while it trains" in message


def test_a_method_that_decides_at_the_end_speaks_for_itself(messages: list[str]) -> None:
    """ARD-LoRA rounds its ranks after the last step, however rarely it resizes before."""
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    ranks = lorank.attach(model, optimizer, lorank.ARDLoRA(alpha_lr=5e-5), total_steps=10)
    for _ in range(10):
        model(**token_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks.detach()
    (message,) = [text for text in messages if "trained parameters" not in text]  # heads are a change of size
    assert message.startswith("ARDLoRA will not move a single rank: with alpha_lr=5e-05")
    assert "ALoRA" not in message


def test_a_run_without_allocation_warns_even_if_it_is_never_ended(messages: list[str]) -> None:
    model = adapted(tiny_llama())
    optimizer = adamw(model)
    lorank.attach(model, optimizer, QUICK, validation_batch=token_batch(), total_steps=10)
    del optimizer, model
    gc.collect()
    assert "the first was due after step 2 of 10, and training stopped before it" in messages[0]


def test_plain_lora_does_not_warn(messages: list[str]) -> None:
    model = adapted(tiny_llama())
    lorank.attach(model, adamw(model), lorank.StaticLoRA(), total_steps=10).detach()
    assert not messages

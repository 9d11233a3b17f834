"""A run without any allocation is warned of once: before it, if the schedule shows it, and at its end."""

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
    assert "will not move a single rank" in messages[0]
    ranks.detach()
    assert "ended without a single allocation: none was due in 10 steps. No rank was changed." in messages[1]


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

"""What every method must do, on a causal language model, an encoder and a vision transformer (lorank.testing)."""

from __future__ import annotations

from typing import Any

import pytest

import lorank
from lorank.errors import AdapterError
from lorank.testing import AllocatorConformance, Loop, TinyModel
from tests.methods import METHODS, STEPS, Method
from tests.models import class_batch, digit_batch, tiny_bert, tiny_vit

OWN = AllocatorConformance.models
MODELS = {
    **OWN,
    "encoder": TinyModel(tiny_bert, lambda i: class_batch(length=6 + i % 3), "AutoModelForSequenceClassification"),
    "vision": TinyModel(tiny_vit, lambda i: digit_batch(first=4 * i), "AutoModelForImageClassification"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
class TestMethods(AllocatorConformance):
    models = MODELS
    steps = STEPS

    @pytest.fixture(autouse=True)
    def _take(self, method: Method) -> None:
        self.method = method
        self.lora = method.lora

    def make(self, budget: Any = None) -> lorank.Allocator:
        return self.method.make(budget)


def test_ranks_per_head_refuse_dora_with_the_remedy() -> None:
    with pytest.raises(AdapterError, match="no per-head form: keep one rank per module with heads='module'"):
        Loop(MODELS["causal"], METHODS["ard-heads"].make(), steps=STEPS, use_dora=True)

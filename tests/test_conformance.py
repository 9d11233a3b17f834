"""What every method must do, on a causal language model, an encoder and a vision transformer (lorank.testing)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorank
from lorank.errors import AdapterError
from lorank.testing import AllocatorConformance, Loop, TinyModel
from tests.methods import METHODS, STEPS, Method
from tests.models import class_batch, digit_batch, tiny_bert, tiny_vit

TRAINER = "test_the_trainer_trains_saves_and_resumes_exactly"
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

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """A Trainer takes seconds: every method with the first model, two of them with the others, below."""
        if metafunc.function.__name__ == TRAINER:
            metafunc.parametrize("model", [MODELS["causal"]], ids=["causal"])
        else:
            super().pytest_generate_tests(metafunc)

    def make(self, budget: Any = None) -> lorank.Allocator:
        return self.method.make(budget)


@pytest.mark.parametrize("kind", ["encoder", "vision"])
@pytest.mark.parametrize("name", ["alora", "ard-heads"])
def test_the_trainer_with_other_models(name: str, kind: str, tmp_path: Path) -> None:
    case = TestMethods()
    case.method, case.lora = METHODS[name], METHODS[name].lora
    getattr(case, TRAINER)(MODELS[kind], tmp_path)


def test_ranks_per_head_refuse_dora_with_the_remedy() -> None:
    with pytest.raises(AdapterError, match="no per-head form: keep one rank per module with heads='module'"):
        Loop(MODELS["causal"], METHODS["ard-heads"].make(), steps=STEPS, use_dora=True)

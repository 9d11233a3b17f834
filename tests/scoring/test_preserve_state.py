"""Scoring leaves no trace, also when it is interrupted."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lorank.lora import find_layers
from lorank.scoring import ablation_scores
from lorank.scoring.preserve_state import preserve_state
from tests.models import adapted, tiny_llama, token_batch


class Interrupted(BaseException):
    pass


def state(model, layers):
    """Everything that training would notice."""
    modules = list(model.modules())
    return {
        "training": [module.training for module in modules],
        "attributes": [sorted(module.__dict__) for module in modules],
        "forward": [module.__dict__.get("forward") for module in modules],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "gates": [id(layer.gate) if layer.gate is not None else None for layer in layers.values()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [id(parameter.grad) for parameter in model.parameters()],
        "gradient values": [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        "weights": [parameter.sum().item() for parameter in model.parameters()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
    }


@pytest.fixture
def model():
    """In training, between backward and step: some modules frozen in evaluation mode, a gate, gradients, a patch."""
    model = adapted(tiny_llama(3), r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    model.train()
    base = model.get_base_model()
    base.model.layers[1].eval()
    base.model.layers[2].forward = base.model.layers[2].forward
    layers = find_layers(model)
    next(iter(layers.values())).gate = torch.tensor([0.5, 1.0], requires_grad=True)
    model(**token_batch()).loss.backward()
    return model


@pytest.mark.parametrize("options", [{}, {"max_rows": 3}, {"engine": "reference"}], ids=["exact", "parts", "reference"])
def test_everything_is_restored(model, options) -> None:
    layers = find_layers(model)
    before = state(model, layers)
    ablation_scores(model, layers, token_batch(), **options)
    assert state(model, layers) == before


def test_the_random_state_of_numpy_and_python_is_restored(model) -> None:
    """A loss function may draw from it."""

    def loss_fn(model, batch):
        return model(**batch).loss + 0 * (random.random() + np.random.rand())  # noqa: NPY002  # the global state is the point

    layers = find_layers(model)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002  # as above
    ablation_scores(model, layers, token_batch(), loss_fn=loss_fn)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002  # as above


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 12, 30])
@pytest.mark.parametrize("engine", ["exact", "reference"])
def test_everything_is_restored_after_an_exception(model, engine, call) -> None:
    """Raised in the watched forward, in the check, while a prefix advances and in the sweep."""
    layers = find_layers(model)
    calls = 0

    def interrupt(_module, _args) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise Interrupted

    model.get_base_model().model.layers[2].mlp.register_forward_pre_hook(interrupt)
    before = state(model, layers)
    with pytest.raises(Interrupted):
        ablation_scores(model, layers, token_batch(), engine=engine, max_rows=4)
    assert state(model, layers) == before


def test_training_learns_in_an_autocast_region_where_scoring_ran() -> None:
    """Weights cast without gradients stay in autocast's cache, and a step would use them."""
    model = adapted(tiny_llama(), r=2, target_modules=["v_proj"])
    layers = find_layers(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = ablation_scores(model, layers, token_batch())
        assert torch.is_autocast_enabled("cpu")
        model(**token_batch()).loss.backward()
    assert result.engine == "exact"
    assert all(layer.A.grad is not None and layer.B.grad is not None for layer in layers.values())


def test_dropout_is_off_and_random_numbers_are_not_used() -> None:
    model = adapted(tiny_llama(), r=2, lora_dropout=0.5)
    model.train()
    layers = find_layers(model)
    a, b = (ablation_scores(model, layers, token_batch()).scores for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in layers)


def test_inside_random_numbers_may_be_drawn_and_modes_set() -> None:
    model = adapted(tiny_llama(1), r=1)
    layers = find_layers(model)
    before = state(model, layers)
    with preserve_state(model, layers):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        model.train()
        model.get_base_model().model.forward = lambda **_: None
        for layer in layers.values():
            layer.gate = torch.zeros(1)
    assert state(model, layers) == before


def test_four_bit_weights_are_not_repacked() -> None:
    """bitsandbytes repacks them for the CPU in evaluation mode, after which training gets no gradient through them."""
    model = adapted(tiny_llama(1), r=1)
    layers = find_layers(model)
    linear = next(iter(layers.values())).module.base_layer
    linear.support_avx512bf16_for_cpu = 1  # as bitsandbytes' C function says it
    with preserve_state(model, layers):
        assert linear.support_avx512bf16_for_cpu is False
    assert linear.support_avx512bf16_for_cpu == 1


def test_a_module_whose_train_does_more_is_only_flagged() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True):
            raise AssertionError("scoring called train()")

    model = adapted(tiny_llama(1), r=1)
    model.get_base_model().extra = Merging(1, 1)
    ablation_scores(model, find_layers(model), token_batch())

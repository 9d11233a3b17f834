"""The fingerprint tells base models of the same shapes apart, and takes the same one in another float type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorank.errors import ResumeError
from lorank.lora import find_layers
from lorank.training.checkpoint.base_fingerprint import base_fingerprint, check_same_base
from tests.models import adapted, tiny_llama
from tests.training.checkpoint.saved_runs import TARGETS, begin, refused


def test_another_base_model_of_the_same_shapes(saved: dict[str, Any]) -> None:
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    refused(saved, r"another base model: the frozen weight of model\.layers\.1\.mlp\.up_proj", base)


def test_the_same_base_model_in_another_float_type(saved: dict[str, Any]) -> None:
    _, optimizer, ranks = begin(tiny_llama().bfloat16())
    optimizer.load_state_dict(saved)
    assert ranks.step == 4


def test_weights_that_are_trained_are_not_compared() -> None:
    model = adapted(tiny_llama(), target_modules=TARGETS)
    layers = find_layers(model)
    every = base_fingerprint(layers)
    assert set(every) == set(layers), "six modules: each is looked at"
    assert all(len(values) == 16 for values in every.values())
    first = next(iter(layers))
    layers[first].module.get_base_layer().weight.requires_grad_()
    assert set(base_fingerprint(layers)) == set(layers) - {first}


@pytest.mark.parametrize(("factor", "other"), [(1.001, False), (1.05, True)])
def test_values_are_compared_with_the_tolerance_of_a_float_type(factor: float, other: bool) -> None:
    layers = find_layers(adapted(tiny_llama(), target_modules=TARGETS))
    saved = {name: [value * factor for value in values] for name, values in base_fingerprint(layers).items()}
    if not other:
        check_same_base(saved, layers)
        return
    with pytest.raises(ResumeError, match="another base model: the frozen weight of"):
        check_same_base(saved, layers)


def test_what_cannot_be_compared_is_not_checked() -> None:
    """Modules that were not looked at, or that were quantised (whole numbers) and are not now."""
    layers = find_layers(adapted(tiny_llama(), target_modules=TARGETS))
    check_same_base({}, layers)
    check_same_base({name: [1] * 16 for name in layers}, layers)
    with pytest.raises(ResumeError, match="another base model"):
        check_same_base({name: [1.0] * 16 for name in layers}, layers)


def test_at_most_eight_modules_evenly_spaced_and_with_the_ends() -> None:
    names = list(find_layers(adapted(tiny_llama())))
    found = base_fingerprint(find_layers(adapted(tiny_llama())))
    assert len(names) == 14
    assert list(found) == [names[i] for i in (0, 1, 3, 5, 7, 9, 11, 13)]
    layer = find_layers(adapted(tiny_llama()))[names[0]]
    weight = layer.module.get_base_layer().weight.detach().flatten()
    assert found[names[0]][0] == weight[0].double().item()
    assert found[names[0]][-1] == weight[-1].double().item()

"""Dropout by places: PEFT's distribution, one draw for modules that see the same input, and no trace left."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from lorank.lora.kernels.sparse_dropout import Dropout, draw_dropped_positions

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.99])
def test_every_number_is_dropped_with_probability_p_independently(p: float) -> None:
    torch.manual_seed(0)
    width, draws = 40, 5000
    hits = torch.zeros(draws, width)
    for row in range(draws):
        positions = draw_dropped_positions(width, p, CPU)
        assert (positions.diff() > 0).all()
        hits[row, positions] = 1
    noise = (p * (1 - p) / draws) ** 0.5
    assert ((hits.mean(0) - p).abs() < 5 * noise).all()  # each place alike, the first and the last too
    assert abs(hits.mean().item() - p) < 5 * noise / width**0.5
    neighbours = (hits[:, 1:] * hits[:, :-1]).mean().item()
    assert abs(neighbours - p**2) < 5 * (p**2 / (draws * (width - 1))) ** 0.5 + 1e-9


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return draw_dropped_positions(1000, 0.1, CPU)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_what_was_dropped_is_zero_and_the_rest_is_untouched() -> None:
    x = torch.randn(3, 4, 5).transpose(0, 1)
    dropped = Dropout()(x, 0.3)
    expected = x.reshape(-1, 5).clone()
    expected.view(-1)[dropped.positions] = 0
    assert dropped.keep == 0.7
    assert len(dropped.positions)
    assert torch.equal(dropped.x, expected)


def test_the_same_input_shares_a_draw_and_nothing_else_does() -> None:
    dropout = Dropout()
    x = torch.randn(20, 10)
    first = dropout(x, 0.2)
    assert dropout(x, 0.2) is first
    assert dropout(x, 0.3) is not first
    again = dropout(x, 0.2)
    x.mul_(2)
    assert dropout(x, 0.2) is not again  # changed in place
    last = dropout(x, 0.2)
    assert dropout(x.clone(), 0.2) is not last
    assert Dropout(shared=False)(x, 0.2) is not Dropout(shared=False)(x, 0.2)


def test_without_sharing_every_module_makes_its_own_draw() -> None:
    dropout = Dropout(shared=False)
    x = torch.randn(20, 10)
    assert not torch.equal(dropout(x, 0.2).x, dropout(x, 0.2).x)


def test_a_recomputed_forward_makes_the_same_draws() -> None:
    """Gradient checkpointing sets the generator back. The same input may still be the last that was seen."""
    dropout = Dropout()
    x = torch.randn(20, 10)
    state = torch.get_rng_state()
    first, after = dropout(x, 0.2), torch.rand(3)
    torch.set_rng_state(state)
    second, after_again = dropout(x, 0.2), torch.rand(3)
    assert torch.equal(first.x, second.x)
    assert torch.equal(after, after_again)


def test_the_draw_of_a_freed_input_is_freed() -> None:
    dropout = Dropout()
    x = torch.randn(20, 10)
    dropout(x, 0.2)
    del x
    gc.collect()
    assert dropout._last is None


def test_a_copy_is_made_without_the_last_draw() -> None:
    dropout = Dropout(shared=False)
    dropout(torch.randn(5, 5), 0.2)
    assert copy.deepcopy(dropout).shared is False


def test_an_inference_tensor_is_dropped_too() -> None:
    with torch.inference_mode():
        x = torch.randn(20, 10)
        assert len(Dropout()(x, 0.2).positions)

"""Draws and held-out parts: seeded, disjoint, complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorank.tasks.errors import DataError
from lorank.tasks.splits import draw, hold_out


@given(st.lists(st.integers(), max_size=50), st.integers(0, 60), st.integers(0, 5))
def test_a_draw_is_a_seeded_part_of_the_items(items: list[int], limit: int, seed: int) -> None:
    drawn = draw(items, limit, seed)
    assert drawn == draw(items, limit, seed)
    assert len(drawn) == min(limit, len(items))
    assert all(drawn.count(item) <= items.count(item) for item in drawn)


def test_another_seed_draws_another_part() -> None:
    assert draw(range(100), 10, seed=0) != draw(range(100), 10, seed=1)


def test_without_a_limit_everything_is_shuffled() -> None:
    drawn = draw(range(100), None, seed=0)
    assert drawn != list(range(100))
    assert sorted(drawn) == list(range(100))


@given(st.lists(st.integers(0, 9), min_size=2).filter(lambda keys: len(set(keys)) > 1), st.floats(0.01, 0.99))
def test_a_held_out_part_is_disjoint_by_key_and_nothing_is_lost(keys: list[int], fraction: float) -> None:
    items = list(enumerate(keys))
    kept, held = hold_out(items, fraction, seed=0, key=lambda item: item[1])
    assert sorted(kept + held) == items
    assert kept
    assert held
    assert not {key for _, key in kept} & {key for _, key in held}
    assert kept == sorted(kept)
    assert held == sorted(held)


def test_one_example_cannot_be_divided() -> None:
    with pytest.raises(DataError, match="Give more data"):
        hold_out(["a", "a"], 0.5, seed=0, key=lambda item: item)

"""A round's allocation step on hand-written score tables."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorank.allocators.reallocation import prune_and_reallocate
from lorank.lora import LayerPlan


def table(**rows: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in rows.items()}


def room(scores: dict[str, torch.Tensor], most: int = 99) -> dict[str, int]:
    return dict.fromkeys(scores, most)


def test_the_papers_example_3_3_2() -> None:
    """n_A = 8, three modules that lost none, ranked m1 > m2 > m3: they receive 3, 3 and 2."""
    scores = table(
        m3=[5.0, 5.0, 5.0], a=[0.1, 0.2, 0.3, 0.4, 9.0], m1=[7.0, 7.0, 7.0], b=[0.1, 0.2, 0.3, 0.4], m2=[6.0, 6.0]
    )
    plan = prune_and_reallocate(scores, 8, room(scores))
    assert plan == {
        "m3": LayerPlan((0, 1, 2), 2),
        "a": LayerPlan((4,)),
        "m1": LayerPlan((0, 1, 2), 3),
        "b": LayerPlan(()),
        "m2": LayerPlan((0, 1), 3),
    }


def test_the_total_shrinks_when_every_module_lost_a_rank() -> None:
    scores = table(a=[0.1, 5.0, 6.0], b=[0.2, 5.0])
    assert prune_and_reallocate(scores, 2, room(scores)) == {"a": LayerPlan((1, 2)), "b": LayerPlan((1,))}


def test_a_module_at_rank_0_receives_nothing() -> None:
    scores = table(empty=[], a=[0.1, 0.2, 5.0], b=[3.0, 3.0])
    assert prune_and_reallocate(scores, 2, room(scores)) == {"a": LayerPlan((2,)), "b": LayerPlan((0, 1), 2)}


def test_a_module_at_rank_0_is_tried_again_with_the_option_and_comes_last() -> None:
    scores = table(empty=[], a=[0.1, 0.2, 0.3, 5.0], b=[-3.0, 3.0, 3.0])
    plan = prune_and_reallocate(table(empty=[], a=[0.1, 0.2, 0.3, 5.0], b=[3.0]), 3, room(scores), retry_empty=True)
    assert plan == {"empty": LayerPlan((), 1), "a": LayerPlan((3,)), "b": LayerPlan((0,), 2)}


def test_ties_break_by_module_then_rank_order() -> None:
    scores = table(a=[1.0, 1.0], b=[1.0, 1.0], c=[1.0, 1.0], d=[1.0, 1.0])
    plan = prune_and_reallocate(scores, 3, room(scores))
    assert plan == {"a": LayerPlan(()), "b": LayerPlan((1,)), "c": LayerPlan((0, 1), 2), "d": LayerPlan((0, 1), 1)}
    assert all(prune_and_reallocate(scores, 3, room(scores)) == plan for _ in range(5))


def test_a_full_module_passes_its_share_on_and_when_all_are_full_the_total_shrinks() -> None:
    scores = table(a=[0.1, 0.2, 0.3, 5.0], b=[9.0, 9.0], c=[8.0])
    plan = prune_and_reallocate(scores, 3, {"a": 9, "b": 2, "c": 9})
    assert plan == {"a": LayerPlan((3,)), "c": LayerPlan((0,), 3)}
    plan = prune_and_reallocate(scores, 3, {"a": 9, "b": 2, "c": 2})
    assert plan == {"a": LayerPlan((3,)), "c": LayerPlan((0,), 1)}


@given(st.data())
def test_every_round_prunes_the_lowest_and_never_exceeds_the_budget(data: st.DataObject) -> None:
    values = st.lists(st.floats(-5, 5, width=32), max_size=5)
    scores = {f"m{i}": torch.tensor(data.draw(values)) for i in range(data.draw(st.integers(2, 6)))}
    total = sum(map(len, scores.values()))
    if total < 2:
        return
    count = data.draw(st.integers(1, total - 1))
    capacity = {name: len(row) + data.draw(st.integers(0, 4)) for name, row in scores.items()}
    plan = prune_and_reallocate(scores, count, capacity, data.draw(st.booleans()))
    kept = {name: plan[name].keep if name in plan else tuple(range(len(row))) for name, row in scores.items()}
    added = {name: plan[name].add if name in plan else 0 for name in scores}
    gone = [float(row[i]) for name, row in scores.items() for i in range(len(row)) if i not in kept[name]]
    stay = [float(row[i]) for name, row in scores.items() for i in kept[name]]
    assert len(gone) == count
    assert max(gone) <= min(stay)
    assert sum(added.values()) <= count
    for name, row in scores.items():
        assert len(kept[name]) + added[name] <= max(capacity[name], len(row))
        assert not (added[name] and len(kept[name]) < len(row))

"""Plans: which ranks stay, where new ones are placed, and plans that fit no layer are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorank.errors import PlanError
from lorank.lora import LayerPlan, plan_for_heads, plan_for_rank, resize_
from lorank.lora.resize_plan import check_places
from tests.lora.forms import DOWN, Q, in_heads
from tests.lora.plans import layer_plans


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (LayerPlan((0, 1, 2)), "must give the ranks of its 4 heads"),
        (LayerPlan((0, 1, 2), head_ranks=(1, 1, 1, 1)), "3 in total"),
        (LayerPlan((0, 1, 2), head_ranks=(1, 1, 1, 0)), "moves a rank to another head"),
        (LayerPlan((1, 0), head_ranks=(1, 1, 0, 0)), "moves a rank to another head"),
        (LayerPlan((), 9, head_ranks=(9, 0, 0, 0)), "can hold at most 8 ranks; the plan asks for 9"),
        (LayerPlan((0,), 1, places=(2,), head_ranks=(2, 0, 0, 0)), "placed at"),
    ],
)
def test_plans_that_do_not_fit_the_heads_are_refused(plan: LayerPlan, said: str) -> None:
    _, layers, _ = in_heads()
    before = layers[Q].A.data.clone()
    with pytest.raises(PlanError, match=said):
        resize_(layers, {Q: plan})
    assert torch.equal(layers[Q].A, before)


def test_a_plain_layer_has_no_ranks_of_heads() -> None:
    _, layers, _ = in_heads()
    with pytest.raises(PlanError, match="not in per-head form"):
        resize_(layers, {DOWN: plan_for_heads([4], [2])})


@given(rank=st.integers(0, 5), data=st.data())
def test_new_ranks_stand_at_their_places_and_kept_ranks_in_their_order(rank: int, data: st.DataObject) -> None:
    plan = data.draw(layer_plans(rank))
    assert len(plan.origins) == plan.rank
    assert tuple(origin for origin in plan.origins if origin >= 0) == plan.keep
    places = tuple(place for place, origin in enumerate(plan.origins) if origin < 0)
    assert places == (tuple(range(len(plan.keep), plan.rank)) if plan.places is None else plan.places)
    check_places("a layer", plan)


def test_a_plan_for_a_rank_keeps_the_first_ranks() -> None:
    assert plan_for_rank(4, 2) == LayerPlan((0, 1))
    assert plan_for_rank(2, 4) == LayerPlan((0, 1), 2)
    assert plan_for_rank(3, 0) == LayerPlan(())


@given(heads=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4))
def test_a_plan_for_heads_is_the_plans_of_its_heads_side_by_side(heads: list[tuple[int, int]]) -> None:
    ranks, wanted = zip(*heads, strict=True)
    expected: list[int] = []
    for head, (rank, want) in enumerate(heads):
        first = sum(ranks[:head])
        expected += [first + i if i < rank else -1 for i in range(want)]
    plan = plan_for_heads(ranks, wanted)
    assert plan.origins == tuple(expected)
    assert plan.head_ranks == wanted


@pytest.mark.parametrize("places", [(0,), (1, 0), (1, 1), (0, 3), (-1, 0)])
def test_places_that_are_missing_unordered_or_out_of_range_are_refused(places: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"2 new ranks are placed at \[.*\]; expected 2 ascending positions below 3"):
        check_places("a layer", LayerPlan((0,), 2, places))

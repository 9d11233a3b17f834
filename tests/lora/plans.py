"""Random plans of one layer, for Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from lorank.lora import LayerPlan


@st.composite
def layer_plans(draw: st.DrawFn, rank: int) -> LayerPlan:
    """Any subset of the ranks in any order, and up to 3 new ranks: at the end, or at any positions."""
    keep = tuple(draw(st.permutations(range(rank)))[: draw(st.integers(0, rank))])
    add = draw(st.integers(0, 3))
    if draw(st.booleans()):
        return LayerPlan(keep, add)
    places = draw(st.permutations(range(len(keep) + add)))[:add]
    return LayerPlan(keep, add, tuple(sorted(places)))


@st.composite
def ranks_and_plans(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, LayerPlan]]:
    """The ranks of one to four layers, and plans for some of them."""
    ranks = {f"layer {i}": rank for i, rank in enumerate(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))}
    plans = {name: draw(layer_plans(rank)) for name, rank in ranks.items() if draw(st.booleans())}
    return ranks, plans

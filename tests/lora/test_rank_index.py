"""Tensors with one entry per rank follow a resize as if they were indexed by hand, rank by rank."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorank.lora import LayerPlan, rank_origins, reindex_ranks
from tests.lora.plans import ranks_and_plans


@given(plans=ranks_and_plans())
def test_origins_of_random_plans(plans: tuple[dict[str, int], dict[str, LayerPlan]]) -> None:
    """Every old rank has a label; the labels of a layer are put in their new order by hand."""
    ranks, plan = plans
    labels = [(name, rank) for name, count in ranks.items() for rank in range(count)]
    expected: list[tuple[str, int] | None] = []
    for name, count in ranks.items():
        change = plan.get(name)
        if change is None:
            expected += [(name, rank) for rank in range(count)]
            continue
        after: list[tuple[str, int] | None] = [(name, rank) for rank in change.keep]
        for place in change.places if change.places is not None else [len(after)] * change.add:
            after.insert(place, None)
        expected += after
    found = rank_origins(plan, ranks)
    assert found.dtype == torch.int64
    assert [None if origin < 0 else labels[origin] for origin in found.tolist()] == expected


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.int64, torch.bool]),
)
def test_values_are_indexed_as_by_hand(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    origins = data.draw(st.lists(st.integers(-1, shape[axis] - 1), max_size=6))
    values = torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = values.clone()
    empty = torch.zeros([*shape[:axis], *shape[axis + 1 :]], dtype=dtype)
    slices = [empty if origin < 0 else values.select(axis, origin) for origin in origins]
    expected = torch.stack(slices, axis) if slices else torch.zeros([*shape[:axis], 0, *shape[axis + 1 :]], dtype=dtype)
    found = reindex_ranks(values, torch.tensor(origins, dtype=torch.long), axis)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(values, before)
    assert not found.numel() or found.data_ptr() != values.data_ptr()

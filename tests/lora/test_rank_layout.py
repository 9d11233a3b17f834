"""Where ranks lie in A and B of a convolution with groups, of experts, and of plain layers."""

from __future__ import annotations

import pytest
import torch

from lorank.lora.basis import Turn, turn_ranks
from lorank.lora.rank_index import reindex_ranks
from lorank.lora.rank_layout import RankAxis

SHAPES = [
    (RankAxis(0), (3, 5)),
    (RankAxis(1), (5, 3)),
    (RankAxis(0, 4), (12, 5, 2, 2)),
    (RankAxis(1), (8, 3, 1, 1)),
    (RankAxis(1, 4, interleaved=True), (5, 12)),
]


@pytest.mark.parametrize(("axis", "shape"), SHAPES)
class TestRankAxis:
    def test_a_matrix_has_what_each_rank_owns(self, axis: RankAxis, shape: tuple[int, ...]) -> None:
        values = torch.randn(shape)
        rows = axis.matrix(values) if axis.axis == 0 else axis.matrix(values).T
        for rank in range(3):
            places = [rank * axis.copies + copy if axis.interleaved else copy * 3 + rank for copy in range(axis.copies)]
            own = [values.select(axis.axis, place).flatten() for place in places]
            assert torch.equal(rows[rank], torch.cat(own))
        assert torch.equal(axis.tensor(axis.matrix(values), values.shape), values)

    def test_ranks_move_with_all_they_own(self, axis: RankAxis, shape: tuple[int, ...]) -> None:
        values, origins = torch.randn(shape), torch.tensor([2, -1, 0, -1])
        moved = reindex_ranks(values, axis.expand_origins(origins, 3), axis.axis)
        by_rank = reindex_ranks(axis.matrix(values), origins, axis.axis)
        assert torch.equal(axis.matrix(moved), by_rank)
        assert torch.equal(axis.tensor(by_rank, values.shape), moved)

    def test_a_turn_of_the_ranks(self, axis: RankAxis, shape: tuple[int, ...]) -> None:
        values, turn = torch.randn(shape), Turn(torch.randn(3, 3).double(), torch.randn(3, 3).double().T)
        wide = axis.expand_turn(turn)
        for matrix, own in ((turn.weight, wide.weight), (turn.gradient, wide.gradient), (turn.square, wide.square)):
            expected = turn_ranks(axis.matrix(values), matrix, axis.axis)
            torch.testing.assert_close(axis.matrix(turn_ranks(values, own, axis.axis)), expected)

    def test_no_rank(self, axis: RankAxis, shape: tuple[int, ...]) -> None:
        empty = torch.randn(shape).narrow(axis.axis, 0, 0)
        assert axis.matrix(empty).shape[axis.axis] == 0
        assert axis.matrix(empty).numel() == 0

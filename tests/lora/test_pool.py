"""Live ranks in a pool of fixed shape: gates, scores and training are as without it, and dead ranks stay dead."""

from __future__ import annotations

import pytest
import torch

from lorank.lora import find_layers
from lorank.lora.pool import Pool, padded
from lorank.scoring import ablation_scores
from tests.lora.forms import plain_and_reserved
from tests.models import token_batch


def test_dead_ranks_have_no_gradient_and_take_no_step() -> None:
    plain, roomy = plain_and_reserved()
    for model, weights in ((plain, find_layers(plain)), (roomy, find_layers(roomy))):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
        for step in range(10):
            model(**token_batch(seed=step)).loss.backward()
            for layer in weights.values():
                if layer.pool is not None:
                    assert not layer.stored[0].grad[layer.rank :].any()
                    assert not layer.stored[1].grad[:, layer.rank :].any()
            optimizer.step()
            optimizer.zero_grad()
    for layer, twin in zip(find_layers(roomy).values(), find_layers(plain).values(), strict=True):
        A, B = layer.stored
        assert not A[layer.rank :].any()
        assert not B[:, layer.rank :].any()
        # Not to the last bit: transformers' norms are in float32, and Adam divides small numbers by small ones.
        assert torch.allclose(A[: layer.rank], twin.A, atol=1e-5)
        assert torch.allclose(B[:, : layer.rank], twin.B, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_have_one_entry_per_live_rank(per_sample: bool) -> None:
    plain, roomy = plain_and_reserved()
    batch = token_batch()
    generator = torch.Generator().manual_seed(0)
    for layer, twin in zip(find_layers(roomy).values(), find_layers(plain).values(), strict=True):
        shape = (len(batch["input_ids"]), layer.rank) if per_sample else (layer.rank,)
        layer.gate = twin.gate = torch.rand(shape, generator=generator, dtype=torch.float64)
    assert torch.allclose(plain(**batch).logits, roomy(**batch).logits, atol=1e-14, rtol=0)


def test_ablation_gives_the_same_scores() -> None:
    plain, roomy = plain_and_reserved()
    ours, theirs = (ablation_scores(model, find_layers(model), token_batch()) for model in (roomy, plain))
    assert theirs.scores.keys() == ours.scores.keys()
    for name, scores in theirs.scores.items():
        assert torch.allclose(ours.scores[name], scores, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_adds_zeros_at_the_end_of_one_axis(axis: int) -> None:
    matrix = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.zeros(5, 3) if axis == 0 else torch.zeros(2, 5)
    for row in range(2):
        for column in range(3):
            expected[row, column] = matrix[row, column].detach()
    found = padded(matrix, axis, 5)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert not found.requires_grad
    assert padded(matrix, axis, matrix.shape[axis]).data_ptr() != matrix.data_ptr()


def test_a_pool_holds_copies_of_the_live_ranks() -> None:
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    pool = Pool(A, B, 5)
    A.zero_()
    assert pool.A.all()
    assert (tuple(pool.A.shape), tuple(pool.B.shape), pool.capacity) == ((2, 3), (4, 2), 5)
    assert isinstance(pool.B, torch.nn.Parameter)

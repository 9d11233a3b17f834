"""alpha and scaling are inverse to each other, with and without rsLoRA."""

from __future__ import annotations

import pytest

from lorank.lora.scaling import alpha_for, scaling_of


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_and_scaling_are_inverse(rslora: bool) -> None:
    for rank in range(1, 65):
        assert scaling_of(alpha_for(0.3, rank, rslora), rank, rslora) == pytest.approx(0.3, rel=1e-15)
    assert scaling_of(0, 0, rslora) == 0


def test_a_whole_alpha_is_an_int() -> None:
    assert isinstance(alpha_for(2.0, 4, use_rslora=False), int)

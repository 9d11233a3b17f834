"""Memory that tensors share is found through views and other Parameters."""

from __future__ import annotations

import torch
from torch import nn

from lorank.lora.shared_memory import memory_range, overlap


def test_views_share_memory_and_neighbours_do_not() -> None:
    whole = torch.zeros(6, 4)
    same = nn.Parameter(whole.T)
    assert overlap(memory_range(whole), memory_range(same))
    assert overlap(memory_range(whole[1:3]), memory_range(whole[2:]))
    assert not overlap(memory_range(whole[:3]), memory_range(whole[3:]))
    assert not overlap(memory_range(whole), memory_range(whole.clone()))


def test_tensors_without_memory_share_none() -> None:
    for tensor in (torch.zeros(0, 4), torch.zeros(3, device="meta")):
        assert memory_range(tensor) is None
        assert not overlap(memory_range(tensor), memory_range(tensor))

"""The hook runs on its own module only."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from lorank.training.live_hook import LiveHook


def test_copies_and_pickles_do_nothing() -> None:
    calls: list[nn.Module] = []
    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(LiveHook(lambda module, _: calls.append(module)))
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for module in (model, *others):
        module(torch.zeros(1, 2))
    assert calls == [model]

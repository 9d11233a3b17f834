"""One process is a group of its own; in lockstep, all processes use the mean of what each has computed."""

from __future__ import annotations

from typing import Any

import torch

from lorank.lora import find_layers
from lorank.training.parallel.process_group import Lockstep, ProcessGroup, is_first_process
from tests.models import adapted, tiny_llama
from tests.training.parallel.threads import together


def test_one_process_exchanges_nothing() -> None:
    group = ProcessGroup.of(find_layers(adapted(tiny_llama(1), target_modules=["q_proj"])))
    assert (group.count, group.index, group.several) == (1, 0, False)
    values = torch.tensor([1.0, 2.0])
    assert group.mean_(values) is values
    assert values.tolist() == [1.0, 2.0]
    assert group.gather(values).tolist() == [[1.0, 2.0]]
    assert group.gather_objects("text") == ["text"]
    group.barrier()
    assert is_first_process()


def test_in_lockstep_every_process_does_all_the_work_and_uses_the_mean() -> None:
    def work(group: Any) -> list[list[float]]:
        share = Lockstep(group)
        assert (share.count, share.index) == (1, 0)
        return share.gather(torch.tensor([1.0, 2.0 + group.index])).tolist()

    assert together(work) == [[[1.0, 2.5]]] * 2

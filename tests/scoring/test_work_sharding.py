"""Scores shared out over processes: three threads with a model each stand for three processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lorank.errors import LorankError, ValidationBatchError
from lorank.lora import find_layers
from lorank.scoring import AblationResult, ablation_scores, first_order_scores
from lorank.scoring.work_sharding import exchange, largest_share, own_items, restore_order
from tests.models import adapted, tiny_llama, token_batch

PROCESSES = 3


class Meeting:
    """Where the processes' gathers meet."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(PROCESSES, timeout=60)
        self.given: list[Tensor] = [torch.empty(0)] * PROCESSES
        self.gathers = 0

    def gather(self, index: int, values: Tensor) -> Tensor:
        assert (values.dtype, values.dim()) == (torch.float64, 1)
        self.given[index] = values.clone()
        self.barrier.wait()
        rows = torch.stack(self.given)
        self.gathers += index == 0
        self.barrier.wait()
        return rows


@dataclass(frozen=True)
class ThreadShare:
    meeting: Meeting
    index: int
    count: int = PROCESSES

    def gather(self, values: Tensor) -> Tensor:
        return self.meeting.gather(self.index, values)


def together(work: Callable[[ThreadShare], Any]) -> list[Any]:
    """What each process's work returns, or the exception that it raised."""
    meeting = Meeting()

    def one(index: int) -> Any:
        torch.set_num_threads(1)
        try:
            return work(ThreadShare(meeting, index))
        except Exception as error:
            return error

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(one, range(PROCESSES)))


def flat(result: AblationResult) -> Tensor:
    return torch.cat(list(result.scores.values()))


@pytest.mark.parametrize("engine", ["exact", "reference"])
def test_all_processes_get_the_scores_of_one(engine) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}}
    models = [adapted(tiny_llama(), **lora) for _ in range(PROCESSES)]  # here: threads share one random generator

    def work(share: ThreadShare | None) -> tuple[AblationResult, int]:
        model = models[share.index if share else 0]
        done = []
        result = ablation_scores(
            model,
            find_layers(model),
            token_batch(padded=True),
            engine=engine,
            share=share,
            progress=lambda now, total: done.append((now, total)),
        )
        assert done[-1][0] == done[-1][1]
        return result, done[-1][0]

    whole, evaluated = work(None)
    shared = together(work)
    for result, _ in shared:
        assert torch.equal(flat(result), flat(shared[0][0])), "the processes have different scores"
        torch.testing.assert_close(flat(result), flat(whole), rtol=0, atol=1e-6)
        assert (result.engine, result.baseline) == (engine, shared[0][0].baseline)
    assert [own for _, own in shared] == [8, 8, 7]  # 20 variants are 7 + 7 + 6, and M in each
    assert evaluated == 21


def test_samples_of_first_order_scores_are_dealt() -> None:
    models = [adapted(tiny_llama(), r=2) for _ in range(PROCESSES)]

    def work(share: ThreadShare | None) -> tuple[AblationResult, int]:
        model, rows = models[share.index if share else 0], []
        handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
        result = first_order_scores(model, find_layers(model), token_batch(7, padded=True), share=share)
        handle.remove()
        return result, rows[-1]

    (whole, _), shared = work(None), together(work)
    for result, _ in shared:
        assert torch.equal(flat(result), flat(shared[0][0])), "the processes have different scores"
        torch.testing.assert_close(flat(result), flat(whole), rtol=0, atol=1e-6)
        assert (result.baseline, result.backward_passes) == (shared[0][0].baseline, 2)
    assert [rows for _, rows in shared] == [3, 2, 2]


def test_where_one_process_fails_all_raise() -> None:
    models = [adapted(tiny_llama(1), r=1, target_modules=["q_proj"]) for _ in range(PROCESSES)]

    def work(share: ThreadShare) -> AblationResult:
        model = models[share.index]

        def loss_fn(model: Any, batch: Any) -> Tensor:
            if share.index == 1:
                raise RuntimeError("out of luck")
            return model(**batch).loss

        return ablation_scores(model, find_layers(model), token_batch(), loss_fn=loss_fn, share=share)

    first, second, third = together(work)
    assert isinstance(second, ValidationBatchError)
    assert isinstance(second.__cause__, RuntimeError)
    assert "out of luck" in str(second)
    for other in (first, third):
        assert isinstance(other, LorankError)
        assert "failed in process 1 of 3" in str(other)


@pytest.mark.parametrize("total", range(8))
def test_dealt_items_come_back_in_their_order(total) -> None:
    def work(share: ThreadShare) -> list[float]:
        own = own_items(range(total), share)
        length = largest_share(total, share)
        assert len(own) <= length
        return restore_order(exchange(lambda: [float(i) for i in own], length, share), total).tolist()

    for result in together(work):
        assert result == [float(i) for i in range(total)]

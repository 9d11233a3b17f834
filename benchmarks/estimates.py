"""The scoring methods that benchmarks/scores.py compares, each with its cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gate_derivatives import hessian_diagonal, label_count
from lorank.lora import AdapterLayers
from lorank.scoring import AblationResult, ablation_scores, first_order_scores, screened_scores
from lorank.scoring.ablation import validation_loss
from lorank.tasks import Example, Task

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Estimate:
    """Scores of all ranks and their cost.

    Attributes:
        scores: (R,), higher = keep.
        seconds: processor time.
        evaluations: number of evaluated variants.
    """

    scores: Tensor
    seconds: float
    evaluations: int = 0


def flat(scores: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([*scores.values()])


def _timed(run: Callable[[], AblationResult]) -> Estimate:
    start = time.process_time()
    result = run()
    return Estimate(flat(result.scores), time.process_time() - start, result.evaluations)


def exact(model: nn.Module, layers: AdapterLayers, batch: Batch) -> Estimate:
    return _timed(lambda: ablation_scores(model, layers, batch))


def truth(model: nn.Module, layers: AdapterLayers, task: Task, examples: Sequence[Example], width: int = 64) -> Tensor:
    """Exact scores on many samples, (R,): a mean over batches of samples of similar length, weighted by their labels.

    IS is linear in the losses, so the weighted mean of the batches' scores is the score on all samples.
    """
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    total, labels = torch.zeros(layers.total_rank, dtype=torch.float64), 0
    for start in range(0, len(ordered), width):
        batch = task.collator(ordered[start : start + width])
        weight = label_count(batch)
        total += weight * exact(model, layers, batch).scores
        labels += weight
    return total / labels


def first_order(model: nn.Module, layers: AdapterLayers, batch: Batch) -> Estimate:
    return _timed(lambda: first_order_scores(model, layers, batch))


def screen(model: nn.Module, layers: AdapterLayers, batch: Batch, count: int) -> Estimate:
    """Scores by successive screening, until the ``count`` lowest ranks are certain."""
    owners = [(name, k) for name, layer in layers.items() for k in range(layer.rank)]

    def lowest(scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        return [owners[i] for i in torch.sort(flat(scores), stable=True).indices[:count].tolist()]

    return _timed(lambda: screened_scores(model, layers, batch, lowest))


def second_order(model: nn.Module, layers: AdapterLayers, batch: Batch, draws: int) -> Estimate:
    """First order plus half the Hessian's diagonal at both ends: + ½ H_rr for L(M without r) and for L(r alone)."""
    start = time.process_time()
    scores = flat(first_order_scores(model, layers, batch).scores)
    without, alone = (hessian_diagonal(model, layers, batch, t, draws) for t in (1.0, 0.0))
    return Estimate(scores + without / 2 - alone / 2, time.process_time() - start)


def alone_exact(model: nn.Module, layers: AdapterLayers, few: Batch, many: Batch) -> Estimate:
    """The strongly curved term, "r alone", evaluated on ``few`` samples; "without r" to first order on ``many``."""
    start = time.process_time()
    without = flat(first_order_scores(model, layers, many, terms="without").scores)
    alone = ablation_scores(
        model, layers, few, terms="alone"
    )  # L(base) − L(r alone): differs from IS's term by a constant
    return Estimate(without + flat(alone.scores), time.process_time() - start, alone.evaluations)


def plain_seconds(model: nn.Module, layers: AdapterLayers, batch: Batch, turns: int = 8) -> float:
    """Seconds of exact scores with plain forward passes: the median of one pass, times 2 R + 1."""
    times = []
    for _ in range(turns):
        start = time.process_time()
        validation_loss(model, layers, batch)
        times.append(time.process_time() - start)
    return sorted(times)[turns // 2] * (2 * layers.total_rank + 1)

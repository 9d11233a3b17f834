"""The worth of every rank of an adapter in its balanced basis, from a few batches, outside of any run.

σ² at the trained weights holds for small changes. A cut that takes most of an adapter away leads far from there, to
weights where the gradients are larger. So Gramians can also be measured on the way: with the whole update multiplied by
factors t below 1, on the straight line from the adapter (t = 1) to the base model (t = 0). Their mean stands for the
curvature on the way. D is of ẑ = ∂loss/∂z at the full factor s, so what is measured with t·s is divided by t².
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorank.errors import ValidationBatchError
from lorank.lora import AdapterLayers
from lorank.scoring.balanced import Balanced, balance
from lorank.scoring.gramians import GramianPair, measure_gramians
from lorank.scoring.loss import LossFn

PATH = (1.0, 0.5)
"""The factors t at which Gramians are measured for a cut."""


def balanced_scores(
    model: nn.Module,
    layers: AdapterLayers,
    batches: Iterable[Mapping[str, Any]],
    *,
    path: Sequence[float] = PATH,
    loss_fn: LossFn | None = None,
    progress: Any = None,
) -> dict[str, Balanced]:
    """σ² of every rank, and the bases to which it belongs (:mod:`lorank.scoring.balanced`).

    The model is not changed. One forward and one backward pass per batch and factor, in evaluation mode.

    Args:
        model: the model that the layers belong to.
        layers: its LoRA layers.
        batches: see :func:`lorank.scoring.measure_gramians`.
        path: the factors t of the update at which Gramians are measured; their mean counts. In (0, 1].
        loss_fn: ``loss_fn(model, batch)`` → a scalar with a graph, in place of ``model(**batch).loss``.
        progress: called with (batches done, batches in all); or None.

    Raises:
        ValidationBatchError: there is no batch; or a batch has no labels, no loss, or a loss that is NaN or infinite;
            or ``path`` is empty or has a factor out of its range.
    """
    given, factors = list(batches), list(path)
    if not factors or not all(0 < factor <= 1 for factor in factors):
        raise ValidationBatchError(f"path={factors}: expected factors of the update above 0 and at most 1")
    found: list[dict[str, GramianPair]] = []
    for index, factor in enumerate(factors):

        def report(done: int, total: int, index: int = index) -> None:
            progress(index * total + done, len(factors) * total)

        with _scaled_by(layers, factor):
            pairs = measure_gramians(
                model, layers, given, loss_fn=loss_fn, progress=None if progress is None else report
            )
        found.append({name: GramianPair(pair.Z, pair.D / factor**2) for name, pair in pairs.items()})
    return {name: balance(layers[name], _mean([pairs[name] for pairs in found])) for name in layers}


def _mean(pairs: Sequence[GramianPair]) -> GramianPair:
    return GramianPair(torch.stack([one.Z for one in pairs]).mean(0), torch.stack([one.D for one in pairs]).mean(0))


@contextmanager
def _scaled_by(layers: AdapterLayers, factor: float) -> Iterator[None]:
    """Multiplies the update of every module by a factor, by a gate on every rank, and restores the gates afterwards."""
    if factor == 1:
        yield
        return
    before = {name: layer.gate for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            gate = before[name]
            ones = torch.ones(layer.rank, dtype=layer.A.dtype, device=layer.A.device) if gate is None else gate.detach()
            layer.gate = ones * factor
        yield
    finally:
        for name, layer in layers.items():
            layer.gate = before[name]

"""The rank curve: what loss to expect from a smaller adapter, for every budget, from one measurement.

In the balanced basis, taking rank i away costs about ½ σ_i² (:mod:`lorank.scoring.balanced`). So for a budget

    L(budget) ≈ L(present) + ½ Σ σ²  of the ranks that the budget leaves out

where the ranks with the largest σ² per trained number stay. Two forward and backward passes over a few batches give the
curve for all budgets, and which module needs which rank at each.

It orders budgets, and is no forecast of a cut without training, which loses two to five times as much where that was
measured. docs/posthoc.md shows the curve beside cut adapters, and beside adapters that were trained at each size.

The **knee** is the budget beyond which parameters pay less than on the average of the curve: the point farthest below
the straight line between the curve's ends, over the logarithm of the budget, where every doubling of the parameters is
one step (Satopää et al., "Finding a Kneedle in a Haystack", ICDCS 2011, without its smoothing, which a curve that only
falls does not need).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorank.allocators.budget import Budget, BudgetLike
from lorank.allocators.resolved_budget import ResolvedBudget
from lorank.errors import BudgetError, ValidationBatchError
from lorank.lora import AdapterLayers, find_layers
from lorank.scoring import balanced_scores, mean_loss
from lorank.scoring.loss import LossFn

PER_DOUBLING = 2
"""Points of the curve per doubling of the budget."""
KNEE = "knee"


@dataclass(frozen=True)
class CurvePoint:
    """The curve at one budget.

    Attributes:
        parameters: numbers in A and B.
        share: the same as a part of the measured adapter, in (0, 1].
        loss: the predicted loss, in the unit of the model's loss.
        ranks: per module, its rank. ≥ 0.
    """

    parameters: int
    share: float
    loss: float
    ranks: Mapping[str, int]


class RankCurve:
    """The predicted loss of an adapter for every budget below its size.

    Args:
        layers: the adapter's LoRA layers, at the ranks that were measured.
        worth: per module σ², (r,) descending.
        loss: the loss of the adapter as it is.

    Attributes:
        loss: the loss of the adapter as it is.
        points: the curve, from the smallest budget to all ranks.
    """

    def __init__(self, layers: AdapterLayers, worth: Mapping[str, Tensor], loss: float) -> None:
        self.loss = loss
        self._layers, self._worth = layers, dict(worth)
        self._measured = layers.ranks
        self._costs = {name: layer.rank_parameters for name, layer in layers.items()}
        self._scalings = {name: layer.file_scaling for name, layer in layers.items()}
        self._use_rslora = bool(layers.config.use_rslora)
        self.points = self._curve()

    @property
    def parameters(self) -> int:
        """Numbers in A and B of the adapter as it is."""
        return sum(rank * self._costs[name] for name, rank in self._measured.items())

    @property
    def knee(self) -> CurvePoint:
        """The point farthest below the line between the curve's ends, over the logarithm of the budget."""
        first, last = self.points[0], self.points[-1]
        width, height = math.log(last.parameters / first.parameters), first.loss - last.loss
        if width <= 0 or height <= 0:
            return first  # no rank is worth anything, or there is one point
        gains = [
            (first.loss - point.loss) / height - math.log(point.parameters / first.parameters) / width
            for point in self.points
        ]
        return self.points[max(range(len(gains)), key=gains.__getitem__)]

    def at(self, budget: BudgetLike) -> CurvePoint:
        """The curve at a budget of your choice.

        Args:
            budget: ``"knee"``, ``"50%"`` (of this adapter), or any budget
                (:class:`~lorank.allocators.budget.Budget`), no larger than the adapter.

        Raises:
            BudgetError: it cannot be parsed, or does not fit the modules.
        """
        if budget == KNEE:
            return self.knee
        if isinstance(budget, str) and (share := re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", budget)):
            budget = f"{share[1]}% of adapter"
        try:
            resolved = Budget.parse(budget).resolve(self._layers, self._measured)
        except BudgetError as error:
            raise BudgetError(f"{error}. A point of the curve is 'knee', '50%' or such a budget") from None
        if all(part.cost(self._measured) < part.limit for part in resolved.constraints):
            raise BudgetError(
                f"{resolved.describe()} is more than the measured adapter has, and the curve ends there: give less, or "
                "measure a wider adapter"
            )
        return self._point(resolved)

    def lora_config(self, budget: BudgetLike) -> dict[str, Any]:
        """The arguments of a ``LoraConfig`` that makes a fresh adapter with the ranks of a budget.

        ``r``, ``lora_alpha``, ``rank_pattern``, ``alpha_pattern`` (s of every module stays as it was measured),
        ``target_modules`` and, for parameters, ``target_parameters`` (full names; those that receive no rank are left
        out), ``use_rslora``. JSON-serialisable.

        Args:
            budget: see :meth:`at`.

        Raises:
            BudgetError: see :meth:`at`.
        """
        ranks = {name: rank for name, rank in self.at(budget).ranks.items() if rank}
        alphas = {
            name: self._scalings[name] * (math.sqrt(rank) if self._use_rslora else rank) for name, rank in ranks.items()
        }
        largest = max(ranks, key=ranks.__getitem__)
        parameters = [name for name in ranks if self._layers[name].is_expert]
        modules = [name for name in ranks if name not in parameters]
        empty = [name for name, layer in self._layers.items() if name not in ranks and not layer.is_expert]
        return {
            "r": ranks[largest],
            "lora_alpha": _whole(alphas[largest]),
            "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items()},
            "alpha_pattern": {f"^{re.escape(name)}": _whole(alpha) for name, alpha in alphas.items()},
            "target_modules": _target_modules(modules, empty),
            **({"target_parameters": parameters} if parameters else {}),
            "use_rslora": self._use_rslora,
        }

    def to_dict(self) -> dict[str, Any]:
        """All points, the knee and σ² of every module. JSON-serialisable."""
        return {
            "loss": self.loss,
            "parameters": self.parameters,
            "knee": vars(self.knee),
            "points": [vars(point) for point in self.points],
            "worth": {name: values.tolist() for name, values in self._worth.items()},
        }

    def _curve(self) -> tuple[CurvePoint, ...]:
        """Two points per doubling, from the whole adapter down to a rank or two."""
        found = [CurvePoint(self.parameters, 1.0, self.loss, dict(self._measured))]
        smallest = max(
            min(self._costs.values()), sum(layer.min_rank * self._costs[name] for name, layer in self._layers.items())
        )
        step = 0
        while True:
            step += 1
            limit = int(self.parameters * 2 ** (-step / PER_DOUBLING))
            if limit < smallest:
                break
            point = self._point(Budget(parameters=limit).resolve(self._layers))
            if 0 < point.parameters < found[-1].parameters:
                found.append(point)
        return tuple(reversed(found))

    def _point(self, budget: ResolvedBudget) -> CurvePoint:
        kept = budget.keep_best(budget.per_cost(self._worth))
        ranks = {name: len(some) for name, some in kept.items()}
        left_out = sum(float(values.sum() - values[list(kept[name])].sum()) for name, values in self._worth.items())
        size = sum(rank * self._costs[name] for name, rank in ranks.items())
        return CurvePoint(size, size / self.parameters, self.loss + max(0.0, left_out) / 2, ranks)


def rank_curve(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter: str | None = None,
    loss_fn: LossFn | None = None,
    progress: Any = None,
) -> RankCurve:
    """Predicts the loss of a trained adapter for every smaller budget, from a few batches. The model is not changed.

        curve = lorank.rank_curve(model, batches)
        curve.knee.share, curve.knee.loss
        LoraConfig(task_type="CAUSAL_LM", **curve.lora_config("knee"))

    Use an adapter that is wider than you want it in the end, after a few hundred steps at least: the curve knows only
    the ranks that are there.

    Args:
        model: a model with a trained LoRA adapter.
        batches: a few batches with ``labels`` that the adapter was not trained on, e.g. 8 of 8 rows.
        adapter: name of the adapter; None: the active adapter.
        loss_fn: ``loss_fn(model, batch)`` → a scalar, the mean over labels, in place of ``model(**batch).loss``.
        progress: called with (batches done, batches in all); or None.

    Raises:
        AdapterError: there is no LoRA adapter.
        ValidationBatchError: there is no batch; or a batch has no labels, no loss, or a loss that is NaN or infinite.
    """
    layers = find_layers(model, adapter)
    given = list(batches)
    if not given:
        raise ValidationBatchError("there is no batch to measure the rank curve on: give at least one")
    found = balanced_scores(model, layers, given, loss_fn=loss_fn, progress=progress)
    loss = mean_loss(model, layers, given, loss_fn=loss_fn)
    return RankCurve(layers, {name: one.worth for name, one in found.items()}, loss)


def _target_modules(alive: Iterable[str], empty: Sequence[str]) -> list[str] | str:
    """Full names; as one regular expression if PEFT would take a name for the end of the name of an empty module."""
    names = list(alive)
    if any(other.endswith(f".{name}") for name in names for other in empty):
        return "|".join(map(re.escape, names))
    return names


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value

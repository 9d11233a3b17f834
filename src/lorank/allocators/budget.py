"""The budget of an adapter, in a unit of the user's choice.

Budget.parse(8)              8 ranks per module on average      Budget.parse("0.32%")   of the base model's parameters
Budget.parse("120 ranks")    in all                             Budget.parse("8MB")     A and B in the saved file
Budget.parse("4M params")    numbers in A and B                 Budget.parse({"percent": 0.32, "max_lora_rank": 64})
Budget.parse("50% of adapter")   of the numbers in A and B of the adapter as it was made
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, TypeAlias, Union

from pydantic import BeforeValidator, Field, PlainSerializer

from lorank.allocators.resolved_budget import Constraint, ResolvedBudget
from lorank.allocators.settings import settings
from lorank.errors import BudgetError
from lorank.lora import AdapterLayer, AdapterLayers, LayerPlan, Plan, base_parameters, plan_for_rank
from lorank.scoring.context import TrainingInfo

EXAMPLES = (
    "8 (ranks per module), '120 ranks', '4M params', '0.32% of base', '50% of adapter', '8MB', or a mapping such as "
    "{percent: 0.32, max_lora_rank: 64}"
)
_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_NUMBER = r"(?P<number>\d+\.?\d*(?:e\d+)?|\.\d+)\s*"
_FORMS = {
    "ranks_per_module": re.compile(_NUMBER + r"(?:(?:ranks?\s*)?(?:per|/)\s*module)?", re.IGNORECASE),
    "ranks": re.compile(_NUMBER + r"ranks?(?:\s+in\s+all)?", re.IGNORECASE),
    "percent_of_adapter": re.compile(_NUMBER + r"%\s*of\s+(?:the\s+)?adapter", re.IGNORECASE),
    "percent": re.compile(_NUMBER + r"%(?:\s*of\s+(?:the\s+)?base(?:\s+model)?)?", re.IGNORECASE),
    "bytes": re.compile(_NUMBER + r"(?:(?P<power>[kmg]i?)b|(?P<plain>)bytes?)", re.IGNORECASE),
    "parameters": re.compile(_NUMBER + r"(?:(?P<power>[km])(?:\s*param(?:eter)?s?)?|param(?:eter)?s?)", re.IGNORECASE),
}


def _whole(value: object) -> object:
    """Converts a float without a fractional part, such as 2e6, to an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int | None, Field(ge=1), BeforeValidator(_whole)]


@settings(raises=BudgetError)
class Budget:
    """The limits on the size of an adapter. Several limits can be combined; then all of them hold.

    Args:
        ranks_per_module: ranks per module, on average over the modules. > 0.
        ranks: ranks of all modules together. ≥ 1.
        parameters: trained numbers in A and B, of all modules together. ≥ 1.
        percent: trained numbers in A and B, in per cent of the base model's parameters. Above 0, at most 100. Packed
            weights (4-bit, GPTQ) count as the numbers that they encode. Adapters and trained copies do not count.
        percent_of_adapter: trained numbers in A and B, in per cent of those of the adapter as it was made. > 0. With
            100 the adapter keeps its parameters, whatever modules the ranks move to.
        bytes: size of A and B in the saved file, in their own dtype. ≥ 1.
        max_lora_rank: the highest rank of any module, as inference servers limit it. ≥ 1. As the only limit, it does
            not change the number of ranks.

    Raises:
        BudgetError: there is no limit, or a limit is out of its range.
    """

    ranks_per_module: Annotated[float | None, Field(gt=0)] = None
    ranks: Count = None
    parameters: Count = None
    percent: Annotated[float | None, Field(gt=0, le=100)] = None
    percent_of_adapter: Annotated[float | None, Field(gt=0)] = None
    bytes: Count = None
    max_lora_rank: Count = None

    def __post_init__(self) -> None:
        if not self.named:
            names = ", ".join(field.name for field in fields(self))
            raise BudgetError(f"the budget has no limit: give one of {names}, e.g. {EXAMPLES}")

    @property
    def named(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def parse(cls, spec: BudgetLike) -> Budget:
        """A budget from what a user writes: a Budget, a mapping of its fields, a number (ranks per module) or a string.

        Strings: ``"8"`` or ``"8 per module"``, ``"120 ranks"``, ``"4M"`` or ``"4M params"`` (k, M), ``"0.32%"`` or
        ``"0.32% of base"``, ``"50% of adapter"``, ``"8MB"``, ``"8MiB"`` or ``"8000 bytes"``.

        Raises:
            BudgetError: ``spec`` has none of these forms.
        """
        if isinstance(spec, Budget):
            return spec
        if isinstance(spec, Mapping):
            return cls(**{str(name): value for name, value in spec.items()})  # type: ignore[arg-type]  # cls checks the values
        if isinstance(spec, (int, float)) and not isinstance(spec, bool):
            return cls(ranks_per_module=spec)
        if isinstance(spec, str):
            for unit, form in _FORMS.items():
                if found := form.fullmatch(spec.strip()):
                    power = _POWERS[(found.groupdict().get("power") or "").lower()]
                    value = float(found["number"]) * power
                    # 4.1M means a whole number, but 4.1 · 10⁶ in floating point is slightly different
                    rounded = round(value) if power > 1 else value
                    return cls(**{unit: rounded})  # type: ignore[arg-type]  # cls checks the value
        raise BudgetError(f"budget {spec!r}: expected {EXAMPLES}")

    def resolve(self, layers: AdapterLayers, made: Mapping[str, int] | None = None) -> ResolvedBudget:
        """This budget for one model: the costs per rank, the limits, and the cap min(d_in, d_out, ``max_lora_rank``).

        Args:
            layers: all LoRA layers of the adapter.
            made: per module, the rank that the adapter was made with (``run.initial_ranks``), for
                ``percent_of_adapter``, and for ``max_lora_rank`` as the only limit; None: the present ranks.

        Raises:
            BudgetError: the budget is less than the modules need, or more than they can hold.
        """
        trained = {name: _trained_cost(layer) for name, layer in layers.items()}
        saved = {
            name: layer.d_in * layer.stored[0].element_size() + layer.d_out * layer.stored[1].element_size()
            for name, layer in layers.items()
        }
        each = dict.fromkeys(layers, 1)
        constraints: list[Constraint] = []
        if self.ranks_per_module is not None:
            limit = _floor(self.ranks_per_module * len(layers))
            constraints.append(Constraint("ranks_per_module", each, limit, len(layers), self.ranks_per_module))
        if self.ranks is not None:
            constraints.append(Constraint("ranks", each, self.ranks))
        if self.parameters is not None:
            constraints.append(Constraint("parameters", trained, self.parameters))
        if self.percent is not None:
            per_cent = base_parameters(layers.model) / 100
            constraints.append(Constraint("percent", trained, _floor(self.percent * per_cent), per_cent, self.percent))
        if self.percent_of_adapter is not None:
            ranks = made or layers.ranks
            per_cent = sum(rank * (layers[name].d_in + layers[name].d_out) for name, rank in ranks.items()) / 100
            limit = _floor(self.percent_of_adapter * per_cent)
            constraints.append(Constraint("percent_of_adapter", trained, limit, per_cent, self.percent_of_adapter))
        if self.bytes is not None:
            constraints.append(Constraint("bytes", saved, self.bytes))
        cap = math.inf if self.max_lora_rank is None else self.max_lora_rank
        caps = {name: int(min(layer.max_rank, cap // layer.module_rank(1))) for name, layer in layers.items()}
        if not constraints:  # only a cap: as many ranks as the adapter was made with, or as the modules can hold
            in_heads = any(layer.groups is not None for layer in layers.values())
            present = sum(made.values()) if made and not in_heads else layers.total_rank
            constraints.append(Constraint("ranks", each, min(present, sum(caps.values()))))
        minima = {name: getattr(layer, "min_rank", 0) for name, layer in layers.items()}
        resolved = ResolvedBudget(tuple(constraints), caps, minima)
        _check(resolved)
        return resolved


def as_budget(spec: BudgetLike) -> Budget | None:
    """Parses a setting as a budget; None stays None."""
    return None if spec is None else Budget.parse(spec)


BudgetLike: TypeAlias = Union[Budget, Mapping[str, float | None], str, float, int, None]  # noqa: UP007  # pydantic reads it
"""The values that a setting accepts as a budget; None: the ranks that the adapter was made with."""
BudgetSetting = Annotated[
    BudgetLike, BeforeValidator(as_budget), PlainSerializer(lambda budget: None if budget is None else budget.named)
]
"""The type of a method's field for its budget. The value is stored as a Budget, so that settings with the same meaning
are equal, and serialised as a mapping of its limits."""


def resolve_budget(spec: BudgetLike, layers: AdapterLayers, run: TrainingInfo | None = None) -> ResolvedBudget | None:
    """The budget of a setting, resolved for a model; None if there is no budget.

    Args:
        spec: the setting.
        layers: all LoRA layers of the adapter.
        run: the run; its initial ranks are those of the adapter as it was made. None: the present ranks are.
    """
    return None if spec is None else Budget.parse(spec).resolve(layers, run.initial_ranks if run else None)


def uniform_plan(spec: BudgetLike, layers: AdapterLayers, run: TrainingInfo | None = None) -> Plan:
    """The plan from the adapter's present ranks to ranks that use up the budget, as evenly as possible.

    The plan is empty without a budget. It is also empty if the present ranks already use up the budget, because the
    user may have chosen them.
    """
    budget = resolve_budget(spec, layers, run)
    if budget is None or budget.is_used_up_by(layers.ranks):
        return {}
    plan: dict[str, LayerPlan] = {}
    for name, rank in budget.uniform().items():
        if rank != layers[name].rank:
            plan[name] = plan_for_rank(layers[name].rank, rank)
    return plan


def _trained_cost(layer: AdapterLayer) -> int:
    """Trained numbers per rank: d_in + d_out, or fewer for a layer with ranks per attention head."""
    return int(getattr(layer, "rank_parameters", layer.d_in + layer.d_out))


def _floor(value: float) -> int:
    """⌊value⌋, tolerant of rounding errors: 0.1 · 30 gives 3."""
    return math.floor(value + 1e-6)


def _check(budget: ResolvedBudget) -> None:
    modules = len(budget.caps)
    for constraint in budget.constraints:
        # An adapter file needs at least one rank: if no module has a minimum, the cheapest rank.
        least = constraint.cost(budget.minima) or min(constraint.costs.values())
        if constraint.limit < least:
            why = " (one rank each: DoRA and trained biases need one)" if any(budget.minima.values()) else ""
            raise BudgetError(
                f"the budget of {constraint.text} is less than the "
                f"{constraint.amount(least)} that {modules} modules need at least{why}: give a larger budget"
            )
    over = [c for c in budget.constraints if c.limit > c.cost(budget.caps)]
    if len(over) == len(budget.constraints):
        first = over[0]
        raise BudgetError(
            f"the budget of {first.text} is more than the {first.amount(first.cost(budget.caps))} "
            f"that {modules} modules can hold, with a rank of at most {max(budget.caps.values())} in each "
            "(min(d_in, d_out), or max_lora_rank): give a smaller budget, or adapt more modules"
        )

"""What an adapter may cost, in the unit that the user thinks in.

Budget.parse(8)              8 ranks per module on average      Budget.parse("0.32%")   of the base model's parameters
Budget.parse("120 ranks")    in all                             Budget.parse("8MB")     A and B in the saved file
Budget.parse("4M params")    numbers in A and B                 Budget.parse({"percent": 0.32, "max_lora_rank": 64})
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

EXAMPLES = (
    "8 (ranks per module), '120 ranks', '4M params', '0.32%' (of the base model), '8MB', or a mapping such as "
    "{percent: 0.32, max_lora_rank: 64}"
)
_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_NUMBER = r"(?P<number>\d+\.?\d*(?:e\d+)?|\.\d+)\s*"
_FORMS = {
    "ranks_per_module": re.compile(_NUMBER + r"(?:(?:ranks?\s*)?(?:per|/)\s*module)?", re.IGNORECASE),
    "ranks": re.compile(_NUMBER + r"ranks?(?:\s+in\s+all)?", re.IGNORECASE),
    "percent": re.compile(_NUMBER + r"%(?:\s*of\s+(?:the\s+)?base(?:\s+model)?)?", re.IGNORECASE),
    "bytes": re.compile(_NUMBER + r"(?:(?P<power>[kmg]i?)b|(?P<plain>)bytes?)", re.IGNORECASE),
    "parameters": re.compile(_NUMBER + r"(?:(?P<power>[km])(?:\s*param(?:eter)?s?)?|param(?:eter)?s?)", re.IGNORECASE),
}


def _whole(value: object) -> object:
    """2e6 is a whole number, however it is written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int | None, Field(ge=1), BeforeValidator(_whole)]


@settings(raises=BudgetError)
class Budget:
    """How much an adapter may cost. Any combination of limits; all of them hold together.

    Args:
        ranks_per_module: on average over the modules. > 0.
        ranks: over all modules together. ≥ 1.
        parameters: numbers in A and B that are trained, over all modules. ≥ 1.
        percent: the same as per cent of the base model's parameters, above 0 and at most 100. Packed weights (4-bit,
            GPTQ) count as the numbers that they stand for; adapters and trained copies are not counted.
        bytes: of A and B in the saved file, in the dtype that they have. ≥ 1.
        max_lora_rank: the highest rank that any module may have, as servers limit it. ≥ 1. By itself it leaves the
            number of ranks as it is.

    Raises:
        BudgetError: no limit, or one out of its range.
    """

    ranks_per_module: Annotated[float | None, Field(gt=0)] = None
    ranks: Count = None
    parameters: Count = None
    percent: Annotated[float | None, Field(gt=0, le=100)] = None
    bytes: Count = None
    max_lora_rank: Count = None

    def __post_init__(self) -> None:
        if not self.named:
            names = ", ".join(field.name for field in fields(self))
            raise BudgetError(f"a budget without a limit: name one of {names}, e.g. {EXAMPLES}")

    @property
    def named(self) -> dict[str, float]:
        """The limits that are set, by their names."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def parse(cls, spec: BudgetLike) -> Budget:
        """A budget from what a user writes: a Budget, a mapping of its fields, a number (ranks per module) or a string.

        Strings: ``"8"`` or ``"8 per module"``, ``"120 ranks"``, ``"4M"`` or ``"4M params"`` (k, M), ``"0.32%"`` or
        ``"0.32% of base"``, ``"8MB"``, ``"8MiB"`` or ``"8000 bytes"``.

        Raises:
            BudgetError: it is none of these.
        """
        if isinstance(spec, Budget):
            return spec
        if isinstance(spec, Mapping):
            return cls(**{str(name): value for name, value in spec.items()})  # type: ignore[arg-type]  # it checks them
        if isinstance(spec, (int, float)) and not isinstance(spec, bool):
            return cls(ranks_per_module=spec)
        if isinstance(spec, str):
            for unit, form in _FORMS.items():
                if found := form.fullmatch(spec.strip()):
                    power = _POWERS[(found.groupdict().get("power") or "").lower()]
                    value = float(found["number"]) * power
                    # 4.1M is meant to be whole, and 4.1 · 10⁶ in floating point is not quite
                    rounded = round(value) if power > 1 else value
                    return cls(**{unit: rounded})  # type: ignore[arg-type]  # as above
        raise BudgetError(f"budget {spec!r}: expected {EXAMPLES}")

    def resolve(self, layers: AdapterLayers) -> ResolvedBudget:
        """This budget for one model: costs per rank and limits, and the cap min(d_in, d_out, ``max_lora_rank``).

        Raises:
            BudgetError: less than the modules need, or more than they can hold, so that it could not be used up.
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
            constraints.append(Constraint("ranks_per_module", each, limit, len(layers)))
        if self.ranks is not None:
            constraints.append(Constraint("ranks", each, self.ranks))
        if self.parameters is not None:
            constraints.append(Constraint("parameters", trained, self.parameters))
        if self.percent is not None:
            per_cent = base_parameters(layers.model) / 100
            constraints.append(Constraint("percent", trained, _floor(self.percent * per_cent), per_cent))
        if self.bytes is not None:
            constraints.append(Constraint("bytes", saved, self.bytes))
        cap = math.inf if self.max_lora_rank is None else self.max_lora_rank
        caps = {name: int(min(layer.max_rank, cap)) for name, layer in layers.items()}
        if not constraints:  # a cap alone: as many ranks as there are, as far as the modules can hold them
            constraints.append(Constraint("ranks", each, min(layers.total_rank, sum(caps.values()))))
        minima = {name: getattr(layer, "min_rank", 0) for name, layer in layers.items()}
        made = ResolvedBudget(tuple(constraints), caps, minima)
        _check(made)
        return made


def as_budget(spec: BudgetLike) -> Budget | None:
    """A setting as the budget that it names."""
    return None if spec is None else Budget.parse(spec)


BudgetLike: TypeAlias = Union[Budget, Mapping[str, float | None], str, float, int, None]  # noqa: UP007  # pydantic reads it
"""What settings accept as a budget; None: the ranks that the adapter was made with."""
BudgetSetting = Annotated[
    BudgetLike, BeforeValidator(as_budget), PlainSerializer(lambda budget: None if budget is None else budget.named)
]
"""The field of a method for its budget: kept as a Budget, so that settings that mean the same are equal, and written
out as a mapping of the limits that it has."""


def resolve_budget(spec: BudgetLike, layers: AdapterLayers) -> ResolvedBudget | None:
    """The limits that a setting stands for in a model, None for no budget."""
    return None if spec is None else Budget.parse(spec).resolve(layers)


def uniform_plan(spec: BudgetLike, layers: AdapterLayers) -> Plan:
    """From the ranks that an adapter was made with to the budget, as evenly as it goes.

    Nothing happens without a budget, nor where the adapter's ranks already use it up: somebody has chosen them.
    """
    limits = resolve_budget(spec, layers)
    if limits is None or limits.is_used_up_by(layers.ranks):
        return {}
    plan: dict[str, LayerPlan] = {}
    for name, rank in limits.uniform().items():
        if rank != layers[name].rank:
            plan[name] = plan_for_rank(layers[name].rank, rank)
    return plan


def _trained_cost(layer: AdapterLayer) -> int:
    """Numbers per rank that are trained: d_in + d_out, or fewer for a layer that is stored per attention head."""
    return int(getattr(layer, "rank_parameters", layer.d_in + layer.d_out))


def _floor(value: float) -> int:
    """⌊value⌋, where 0.1 · 30 is 3."""
    return math.floor(value + 1e-6)


def _check(limits: ResolvedBudget) -> None:
    modules = len(limits.caps)
    for constraint in limits.constraints:
        # a file needs one rank somewhere: the cheapest, where no module needs one of its own
        least = constraint.cost(limits.minima) or min(constraint.costs.values())
        if constraint.limit < least:
            raise BudgetError(
                f"the budget of {_amount(constraint, constraint.limit)} is less than the "
                f"{_amount(constraint, least)} that {modules} modules need at least: name a larger one"
            )
    over = [c for c in limits.constraints if c.limit > c.cost(limits.caps)]
    if len(over) == len(limits.constraints):
        first = over[0]
        raise BudgetError(
            f"the budget of {_amount(first, first.limit)} is more than the {_amount(first, first.cost(limits.caps))} "
            f"that {modules} modules can hold, with a rank of at most {max(limits.caps.values())} in each "
            "(min(d_in, d_out), or max_lora_rank): name a smaller one, or adapt more modules"
        )


def _amount(constraint: Constraint, cost: int) -> str:
    unit = {"ranks_per_module": "ranks per module", "percent": "per cent of the base model"}
    return f"{cost / constraint.unit_size:.6g} {unit.get(constraint.unit, constraint.unit)}"

"""What is to become of the layers: which ranks stay, how many are new, and where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorank.errors import PlanError
from lorank.lora.layer import AdapterLayer


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Args:
        keep: indices of the ranks that stay, in their new order.
        add: how many new ranks there are. They follow those that stay, unless ``places`` says otherwise.
        places: the positions of the new ranks among all, ascending; None: the last ones.
        head_ranks: for a layer in per-head form (see :func:`plan_for_heads`), the ranks of each head afterwards.
    """

    keep: tuple[int, ...]
    add: int = 0
    places: tuple[int, ...] | None = None
    head_ranks: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return len(self.keep) + self.add

    @property
    def origins(self) -> tuple[int, ...]:
        """For each rank afterwards, its index before, or −1 for a new one."""
        if self.places is None:
            return self.keep + (-1,) * self.add
        new, kept = set(self.places), iter(self.keep)
        return tuple(-1 if place in new else next(kept) for place in range(self.rank))


def plan_for_rank(rank: int, wanted: int) -> LayerPlan:
    """Takes a layer from ``rank`` to ``wanted`` ranks: the first ones stay, new ones follow."""
    return LayerPlan(tuple(range(min(rank, wanted))), max(0, wanted - rank))


def plan_for_heads(ranks: Sequence[int], wanted: Sequence[int]) -> LayerPlan:
    """Takes the heads of a layer from ``ranks`` to ``wanted``: of each head the first ones stay, new ones follow them.

    Args:
        ranks: r_h of every head now, (H,).
        wanted: r_h of every head afterwards, (H,).
    """
    keep: list[int] = []
    places: list[int] = []
    before = after = 0
    for rank, want in zip(ranks, wanted, strict=True):
        kept = min(rank, want)
        keep += range(before, before + kept)
        places += range(after + kept, after + want)
        before, after = before + rank, after + want
    return LayerPlan(tuple(keep), len(places), tuple(places), tuple(wanted))


Plan = Mapping[str, LayerPlan]
"""Layers by name; a layer that is not named stays as it is."""


def check_places(name: str, wanted: LayerPlan) -> None:
    """Raises PlanError where the new ranks of a plan are placed outside of it."""
    if wanted.places is not None and (
        len(wanted.places) != wanted.add
        or list(wanted.places) != sorted(set(wanted.places))
        or any(not 0 <= place < wanted.rank for place in wanted.places)
    ):
        raise PlanError(
            f"{name}: the plan's {wanted.add} new ranks are placed at {list(wanted.places)}; expected as many "
            f"positions below {wanted.rank}, ascending"
        )


def check_heads(layer: AdapterLayer, wanted: LayerPlan) -> None:
    """Raises PlanError unless the plan of a layer in per-head form leaves every rank in head order, with its head."""
    if layer.groups is None:
        if wanted.head_ranks is not None:
            raise PlanError(f"{layer.name} is not in per-head form; the plan names ranks of its heads")
        return
    given = wanted.head_ranks
    if given is None or len(given) != layer.groups.count or min(given) < 0 or sum(given) != wanted.rank:
        raise PlanError(
            f"{layer.name} is in per-head form: its plan must name the ranks of its {layer.groups.count} heads, "
            f"{wanted.rank} in all; it names {given}. Use plan_for_heads"
        )
    if max(given) > layer.groups.capacity(layer.d_in, layer.d_out):
        raise PlanError(
            f"a head of {layer.name} can hold at most {layer.groups.capacity(layer.d_in, layer.d_out)} ranks; the plan "
            f"asks for {max(given)}"
        )
    owners = [head for head, rank in enumerate(layer.head_ranks) for _ in range(rank)]
    after = [head for head, rank in enumerate(given) for _ in range(rank)]
    if any(origin >= 0 and owners[origin] != after[place] for place, origin in enumerate(wanted.origins)):
        raise PlanError(f"{layer.name}: the plan moves a rank to another head")

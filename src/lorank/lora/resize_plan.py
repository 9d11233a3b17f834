"""Plans for changing ranks: which ranks a layer keeps, how many it gains, and at which positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorank.errors import PlanError
from lorank.lora.basis import Basis, digest_of
from lorank.lora.layer import AdapterLayer


class NewVectors:
    """The first values of new ranks, in place of random ones.

    Args:
        values: (n, d_in), rows of A (of all experts side by side, if there are any); for an embedding (n, d_out),
            columns of B. The other factor is zero. n ≥ the number of new ranks, which take the first of them.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NewVectors) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"NewVectors({tuple(self.values.shape)}, {digest_of(self.values.double())})"


@dataclass(frozen=True)
class LayerPlan:
    """The change of ranks of one layer.

    Args:
        keep: the indices of the ranks that are kept, in their new order.
        add: the number of new ranks. ≥ 0.
        places: the positions of the new ranks after the change, ascending; None: after the kept ranks.
        head_ranks: for a layer in per-head form (see :func:`plan_for_heads`), the rank of each head after the change.
        basis: the basis to which the layer is turned before ranks are kept; ``keep`` counts the ranks of this basis.
            None: the present one.
        vectors: the first values of the new ranks; None: as PEFT initialises them.
    """

    keep: tuple[int, ...]
    add: int = 0
    places: tuple[int, ...] | None = None
    head_ranks: tuple[int, ...] | None = None
    basis: Basis | None = None
    vectors: NewVectors | None = None

    @property
    def rank(self) -> int:
        return len(self.keep) + self.add

    @property
    def origins(self) -> tuple[int, ...]:
        """For each rank after the change, its index before the change, or −1 for a new rank."""
        if self.places is None:
            return self.keep + (-1,) * self.add
        new, kept = set(self.places), iter(self.keep)
        return tuple(-1 if place in new else next(kept) for place in range(self.rank))


def plan_for_rank(rank: int, wanted: int) -> LayerPlan:
    """Changes a layer from ``rank`` to ``wanted`` ranks. The first ranks are kept; new ranks are added at the end."""
    return LayerPlan(tuple(range(min(rank, wanted))), max(0, wanted - rank))


def plan_for_heads(ranks: Sequence[int], wanted: Sequence[int]) -> LayerPlan:
    """Changes the heads of a layer from ``ranks`` to ``wanted`` ranks.

    Each head keeps its first ranks; its new ranks are added after them.

    Args:
        ranks: r_h of every head before the change, (H,).
        wanted: r_h of every head after the change, (H,).
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


INVERSE_TOLERANCE = 1e-9
"""How far M M⁻¹ may be from the identity, relative to the products that are summed up."""


def check_basis(layer: AdapterLayer, wanted: LayerPlan) -> None:
    """Raises PlanError if a layer cannot be turned to the plan's basis."""
    if wanted.basis is None:
        return
    matrix, inverse = wanted.basis.matrix, wanted.basis.inverse
    square = (layer.rank, layer.rank)
    shapes_allowed = [square] + [(layer.layout.experts, *square)] * (layer.layout.experts > 1)
    if tuple(matrix.shape) not in shapes_allowed or inverse.shape != matrix.shape:
        shapes = f"{tuple(matrix.shape)} and {tuple(inverse.shape)}"
        raise PlanError(
            f"{layer.name} has {layer.rank} ranks; the plan's basis has matrices of shapes {shapes}, expected "
            f"({layer.rank}, {layer.rank})"
        )
    if layer.groups is not None or layer.gate is not None:
        form = "in per-head form" if layer.groups is not None else "with gates"
        raise PlanError(
            f"{layer.name} is {form}, where every rank belongs to its own head or gate, so its basis cannot change: "
            "fold gates and merge heads first (lorank.lora.fold_gates_, merge_heads_), or plan without a basis"
        )
    if not bool(matrix.isfinite().all() and inverse.isfinite().all()):
        raise PlanError(f"{layer.name}: the plan's basis has NaN or infinite entries. Training may have diverged")
    sizes = matrix.double().abs() @ inverse.double().abs()  # what rounding is relative to
    error = (matrix.double() @ inverse.double() - torch.eye(layer.rank, dtype=torch.float64)).abs()
    if bool((error > INVERSE_TOLERANCE * (1 + sizes)).any()):
        raise PlanError(
            f"{layer.name}: the plan's basis has an inverse that is not the inverse of its matrix (their product is "
            f"{float(error.max()):.1g} from the identity), so the layer's function would change. Give "
            "Basis(M, torch.linalg.inv(M)) in float64"
        )


def check_vectors(layer: AdapterLayer, wanted: LayerPlan) -> None:
    """Raises PlanError if the first values of new ranks do not fit the layer."""
    if wanted.vectors is None:
        return
    width = layer.d_out if layer.is_embedding else layer.A.shape[1:].numel() * layer.axes[0].copies
    shape = tuple(wanted.vectors.values.shape)
    if len(shape) != 2 or shape[1] != width or shape[0] < wanted.add:
        raise PlanError(
            f"{layer.name}: the first values of the plan's {wanted.add} new ranks have shape {shape}; expected "
            f"({wanted.add}, {width})"
        )
    if not bool(wanted.vectors.values.isfinite().all()):
        raise PlanError(f"{layer.name}: the first values of the plan's new ranks have NaN or infinite entries")


Plan = Mapping[str, LayerPlan]
"""The plans of layers, by layer name. A layer without a plan is unchanged."""


def check_places(name: str, wanted: LayerPlan) -> None:
    """Raises PlanError if the positions of a plan's new ranks are out of range, not ascending or of another number."""
    if wanted.places is not None and (
        len(wanted.places) != wanted.add
        or list(wanted.places) != sorted(set(wanted.places))
        or any(not 0 <= place < wanted.rank for place in wanted.places)
    ):
        raise PlanError(
            f"{name}: the plan's {wanted.add} new ranks are placed at {list(wanted.places)}; expected {wanted.add} "
            f"ascending positions below {wanted.rank}"
        )


def check_heads(layer: AdapterLayer, wanted: LayerPlan) -> None:
    """Raises PlanError unless the plan of a layer in per-head form keeps every rank in its head and in head order."""
    if layer.groups is None:
        if wanted.head_ranks is not None:
            raise PlanError(f"{layer.name} is not in per-head form, but its plan gives ranks of heads: omit head_ranks")
        return
    given = wanted.head_ranks
    if given is None or len(given) != layer.groups.count or min(given) < 0 or sum(given) != wanted.rank:
        raise PlanError(
            f"{layer.name} is in per-head form: its plan must give the ranks of its {layer.groups.count} heads, "
            f"{wanted.rank} in total; it gives {given}. Use plan_for_heads"
        )
    if max(given) > layer.groups.capacity(layer.d_in, layer.d_out):
        raise PlanError(
            f"a head of {layer.name} can hold at most {layer.groups.capacity(layer.d_in, layer.d_out)} ranks; the plan "
            f"asks for {max(given)}"
        )
    heads_before = [head for head, rank in enumerate(layer.head_ranks) for _ in range(rank)]
    heads_after = [head for head, rank in enumerate(given) for _ in range(rank)]
    if any(origin >= 0 and heads_before[origin] != heads_after[place] for place, origin in enumerate(wanted.origins)):
        raise PlanError(f"{layer.name}: the plan moves a rank to another head. Use plan_for_heads")

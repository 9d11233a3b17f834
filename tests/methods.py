"""Every method, with settings under which a dozen steps of a tiny model show all that it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorank import Allocator, allocators
from lorank.allocators.registry import OWN


@dataclass(frozen=True)
class Method:
    """How to run a method in a conformance test.

    Args:
        make: the allocator for a budget (None: its default).
        lora: what it wants of the adapter that it starts from.
        heads: whether every attention head has ranks of its own, a form that DoRA does not have.
    """

    make: Callable[..., Allocator]
    lora: dict[str, Any] = field(default_factory=dict)
    heads: bool = False


STEPS = 12
ROUNDS = {"k1": 3, "k2": 3, "rounds": 3, "unit": "steps", "per_round": 5}
BALANCED: dict[str, Any] = {"wide": 2, "until": 0.6, "init": "default"}
QUICK = {"alpha_lr": 0.05, "l1": 0.05, "resize_every": 2, "hold": 1}

_CHOSEN: dict[str, Method] = {
    "alora": Method(lambda budget=None: allocators.ALoRA(**ROUNDS, budget=budget, scores="exact")),
    "alora-retry": Method(
        lambda budget=None: allocators.ALoRA(**ROUNDS, budget=budget, scores="exact", retry_empty=True, terms="without")
    ),
    "alora-first-order": Method(lambda budget=None: allocators.ALoRA(**ROUNDS, budget=budget, scores="first_order")),
    "alora-sensi": Method(lambda budget=None: allocators.ALoRASensi(**ROUNDS, budget=budget)),
    "alora-dnas": Method(lambda budget=None: allocators.ALoRADNAS(**ROUNDS, budget=budget, search_rows=2)),
    "adalora": Method(lambda budget=None: allocators.AdaLoRA(budget=budget, t_init=2, t_final=4, delta_t=2)),
    "sora": Method(lambda budget=None: allocators.SoRA(budget=budget, prune_every=2)),
    "balanced": Method(lambda budget=None: allocators.BalancedLoRA(budget=budget, **BALANCED)),
    "ard": Method(lambda budget=None: allocators.ARDLoRA(**QUICK, budget=budget, heads="module")),
    "ard-heads": Method(lambda budget=None: allocators.ARDLoRA(**QUICK, budget=budget, min_rank=0), heads=True),
}


def _with_defaults(kind: type[Allocator]) -> Method:
    return Method(lambda budget=None: kind(budget=budget))  # type: ignore[call-arg]  # every method of ours has one


_NAMED = {type(method.make()) for method in _CHOSEN.values()}
_OWN = {name: kind for name, kind in allocators.find_allocators().classes.items() if name in OWN}
METHODS = {**{name: _with_defaults(kind) for name, kind in _OWN.items() if kind not in _NAMED}, **_CHOSEN}
"""A method that is not named above, such as plain LoRA, is tested with its default settings."""

DORA = Method(METHODS["alora"].make, lora={"use_dora": True})
WITH_DORA = {**METHODS, "dora": DORA}
"""Where DoRA makes a difference that the methods do not."""

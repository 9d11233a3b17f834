"""The methods of the planted study: one entry per method, with its settings to tune.

Every method has the same number of settings to choose from (``GRID``): two learning rates, or two values of one knob,
a setting of the method itself. These two values and the other settings here come from a wider search on problems that
are not reported (docs/planted.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorank.allocators import AdaLoRA, Allocator, ALoRA, ALoRADNAS, ALoRASensi, ARDLoRA, BalancedLoRA, SoRA, StaticLoRA
from lorank.experiments.planted.problem import Problem

GRID = 2
Ranks = Mapping[str, int]


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        title: its name in tables.
        ranks: the initial ranks of its student.
        allocator: makes the allocator for a problem and a value of the knob.
        lrs: learning rates to try.
        knob: the name of the method's own setting to tune; None: it has none.
        knobs: values of the knob to try.
        where: the scenarios in which the method can be used.
    """

    title: str
    ranks: Callable[[Problem], Ranks]
    allocator: Callable[[Problem, Any], Allocator]
    lrs: tuple[float, ...]
    knob: str | None = None
    knobs: tuple[Any, ...] = (None,)
    where: tuple[str, ...] = ("modules", "heads")

    @property
    def grid(self) -> list[tuple[float, Any]]:
        """All pairs (learning rate, knob) to try."""
        return [(lr, knob) for lr in self.lrs for knob in self.knobs]


def uniform(problem: Problem, total: int | None = None) -> Ranks:
    """``total`` ranks (default: the budget), evenly distributed; the remainder goes to modules drawn by the seed."""
    names = list(problem.true)
    each, rest = divmod(problem.budget if total is None else total, len(names))
    draw = torch.Generator().manual_seed(problem.seed + 7)
    more = set(torch.randperm(len(names), generator=draw)[:rest].tolist())
    return {name: each + (i in more) for i, name in enumerate(names)}


def generous(problem: Problem) -> Ranks:
    """The highest rank that may be planted, in every place: the initial ranks of methods that prune to the budget."""
    most = problem.scenario.most
    return {name: most * max(1, len(problem.true_heads.get(name, ()))) for name in problem.true}


def oracle(problem: Problem) -> Ranks:
    """The true ranks."""
    return problem.true


def random(problem: Problem) -> Ranks:
    """The budget at random: each rank goes to a module drawn with equal probability."""
    names = list(problem.true)
    draw = torch.Generator().manual_seed(problem.seed + 11)
    owners = torch.randint(0, len(names), (problem.budget,), generator=draw)
    return dict(zip(names, torch.bincount(owners, minlength=len(names)).tolist(), strict=True))


def rounds(problem: Problem) -> dict[str, Any]:
    """The schedule of ALoRA and its variants: twelve rounds in the first 54 % of a run, a tenth of the budget each."""
    steps = problem.scenario.steps
    return {
        "unit": "steps",
        "k1": steps * 0.06,
        "k2": steps * 0.04,
        "rounds": 12,
        "per_round": max(1, round(problem.budget / 10)),
    }


def _budget(problem: Problem) -> str:
    return f"{problem.budget} ranks"


def _static(problem: Problem, _: Any) -> Allocator:
    return StaticLoRA()


LRS = (1e-2, 2e-2)

METHODS: Mapping[str, Method] = {
    "uniform": Method("LoRA, uniform", uniform, _static, LRS),
    "oracle": Method("LoRA, true ranks", oracle, _static, LRS),
    "random": Method("LoRA, random ranks", random, _static, LRS),
    "alora": Method("ALoRA, both terms", uniform, lambda p, _: ALoRA(**rounds(p), scores="exact"), LRS),
    "alora-without": Method(
        "ALoRA, without", uniform, lambda p, _: ALoRA(**rounds(p), scores="exact", terms="without"), LRS
    ),
    "alora-dnas": Method(
        "ALoRA-DNAS",
        uniform,
        lambda p, gate_lr: ALoRADNAS(**rounds(p), gate_lr=gate_lr),
        (1e-2,),
        "gate_lr",
        (1e-2, 5e-2),
    ),
    "alora-sensi": Method("ALoRA-Sensi", uniform, lambda p, _: ALoRASensi(**rounds(p)), LRS),
    "adalora": Method("AdaLoRA", generous, lambda p, _: AdaLoRA(budget=_budget(p)), LRS),
    "balanced": Method("BalancedLoRA", uniform, lambda p, _: BalancedLoRA(budget=_budget(p)), LRS),
    "sora": Method("SoRA", generous, lambda p, _: SoRA(gate_lr=0.3, budget=_budget(p)), LRS),
    "ard": Method(
        "ARD-LoRA",
        generous,
        lambda p, alpha_lr: ARDLoRA(
            r0=p.scenario.most,
            heads="auto" if p.scenario.where == "heads" else "module",
            min_rank=0,
            alpha_lr=alpha_lr,
            tau_start=1.0,  # the loss has a gradient beyond one rank, so a module that lost ranks early can regain them
            tau_end=0.2,
            resize_every=5,
            hold=2,
            reach=0.4,
            settle=0.5,  # ranks are final in the middle of the run, as in ALoRA and SoRA, and nearly as in AdaLoRA
            budget=_budget(p),
        ),
        (1e-2,),
        "alpha_lr",
        (3e-2, 1e-1),
    ),
}


def method_of(name: str) -> Method:
    """The method of this name: a key of ``METHODS``, or ``uniform*k``, LoRA with k times as many ranks."""
    base, _, factor = name.partition("*")
    if not factor:
        return METHODS[name]
    times = float(factor)
    return replace(
        METHODS[base], title=f"LoRA, {times:g} × the ranks", ranks=lambda p: uniform(p, round(p.budget * times))
    )

"""A problem whose right ranks are known: a frozen model, and the same model with low-rank updates planted in it.

    teacher:  W* = W + ΔW*,   rank(ΔW*_m) = r*_m, known, different for every module, 0 for about half of them
    student:  W + s·B A,      Σ r_m = Σ r*_m, trained on the teacher's logits

    loss = E‖logits(student) − logits(teacher)‖² / E‖logits(model) − logits(teacher)‖²

over tokens of real text: 1 for a student that has learnt nothing, 0 for one that has learnt everything. Mean squared
error rather than a divergence, because the output embedding E is frozen and shared: ‖E (h − h*)‖² = ‖(h − h*) F‖² with
F Fᵀ = EᵀE, so that the last hidden states h, a twentieth of the numbers, give it exactly.

How the updates are drawn, with ``sized="weight"`` (the default): ΔW* = c · U V, U (d_out × r*) and V (r* × d_in) with
random orthonormal columns and rows, c such that ‖ΔW*‖ = relative · ‖W‖ · √(r*/most). Every planted rank changes its own
W as much, as fine-tuning might, but not the logits: one of them may be worth many times another, and an allocation can
be better than the true one.

With ``sized="effect"`` every planted rank is worth the same, so that the true ranks are also the best: a harder
problem. ΔW* = c · U G Λ^(−1/2) Qᵀ, where Q Λ Qᵀ are the k main components of the module's inputs and G (r* × k)
has random orthonormal rows: every rank answers to the inputs as strongly as the others. c is such that an update alone
changes the logits by E‖change‖² = effect² · r* · E‖logits‖². That takes updates of different sizes relative to W
(`Problem.relative_norms`); where it would take one larger than W, the place is passed over and another one is drawn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorank.experiments.planted.planting import (
    draw_places,
    draw_tokens,
    draw_update,
    moments,
    root,
    scale_for,
    targets,
    tiny_blocks,
    whitened,
)

PARTS = {"train": "train", "validation": "validation", "selection": "validation", "test": "test"}
"""The parts of a problem's text, and the split of the manual that each is drawn from. Validation, which ranks are
scored on, and selection, by which learning rates are chosen, share no block."""


@dataclass(frozen=True)
class Scenario:
    """What is planted, and how students learn.

    Args:
        where: ``"modules"``: in whole modules, all linear maps being adapted; ``"heads"``: in attention heads (rows of
            q, k, v, columns of o), the four attention projections being adapted.
        layers: how many of the tiny Llama's six blocks are used.
        planted: the part of the modules, or of each module's heads, that get an update.
        most: the highest rank that is planted; ranks are drawn evenly from 1 to it.
        sized: what is the same for all planted ranks: how much they change their own W (``"weight"``), or how much they
            change the logits (``"effect"``).
        relative: for ``"weight"``: ‖ΔW*‖/‖W‖ of an update of rank ``most`` (a head's of its own rows or columns).
        effect: for ``"effect"``: how much one planted rank changes the logits, relative to their size (root mean
            square).
        largest: for ``"effect"``: the most that an update may be of W's size (Frobenius norms, a head's of its own
            rows or columns).
        directions: for ``"effect"``: k, the main components of a module's inputs that planted ranks may answer to.
        block: tokens per sample.
        train: samples that students are trained on.
        held_out: samples of the selection part, and of the test part.
        scored: samples that ranks are scored on.
        steps: optimiser steps of every student.
        batch: samples per step.
        scaling: s of every student.
    """

    where: Literal["modules", "heads"] = "modules"
    layers: int = 3
    planted: float = 0.5
    most: int = 8
    sized: Literal["weight", "effect"] = "weight"
    relative: float = 0.5
    effect: float = 0.01
    largest: float = 1.0
    directions: int = 32
    block: int = 32
    train: int = 512
    held_out: int = 128
    scored: int = 24
    steps: int = 2400
    batch: int = 16
    scaling: float = 0.5

    @property
    def samples(self) -> dict[str, int]:
        """Samples per part."""
        return {"train": self.train, "validation": self.scored, "selection": self.held_out, "test": self.held_out}


@dataclass(frozen=True)
class Problem:
    """One drawn problem.

    Attributes:
        scenario: its settings.
        seed: what it was drawn from.
        base: the frozen model without updates.
        updates: ΔW*, (d_out, d_in) per module that has one.
        true: r* of every adapted module, in the model's order. The rank of ΔW*: for heads the sum over them.
        true_heads: the rank of each head, (H,) per module; empty where whole modules are planted.
        roots: per module of ``updates``, C^(1/2): (d_in, d_in) with C = E[x xᵀ] of its inputs in the base model.
        readout: F, (d, d).
        size: E‖logits(model) − logits(teacher)‖², per token, on training text.
        tokens: per part, (samples, block).
        hidden: per part, the teacher's last hidden states, (samples, block, d).
    """

    scenario: Scenario
    seed: int
    base: PreTrainedModel
    updates: Mapping[str, Tensor]
    true: Mapping[str, int]
    true_heads: Mapping[str, tuple[int, ...]]
    roots: Mapping[str, Tensor]
    readout: Tensor
    size: float
    tokens: Mapping[str, Tensor]
    hidden: Mapping[str, Tensor]

    @property
    def budget(self) -> int:
        """Σ r*: what every student has."""
        return sum(self.true.values())

    @property
    def relative_norms(self) -> dict[str, float]:
        """‖ΔW*‖/‖W‖ (Frobenius) of every module with an update."""
        weights = {name: cast(Tensor, self.base.get_submodule(name).weight) for name in self.updates}
        return {name: float(update.norm() / weights[name].norm()) for name, update in self.updates.items()}

    def to(self, device: torch.device | str) -> Problem:
        """The same problem, with what training reads on ``device``; what is only measured with stays where it is."""
        if torch.device(device) == self.readout.device:
            return self
        return replace(
            self,
            base=cast(PreTrainedModel, cast(nn.Module, copy.deepcopy(self.base)).to(device)),
            readout=self.readout.to(device),
            tokens={part: tokens.to(device) for part, tokens in self.tokens.items()},
            hidden={part: hidden.to(device) for part, hidden in self.hidden.items()},
        )

    def batch(self, part: str) -> dict[str, Tensor]:
        """All samples of a part, as :meth:`loss` takes them."""
        return {"input_ids": self.tokens[part], "hidden": self.hidden[part]}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss above, a scalar. ``model``: the base or a ``PeftModel`` around a copy of it."""
        difference = last_hidden(model, batch["input_ids"]) - batch["hidden"]  # (n, T, d)
        loss: Tensor = (difference @ self.readout).square().sum(-1).mean() / self.size
        return loss


def last_hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """The hidden states that the output embedding takes, (n, T, d)."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()  # out of the PeftModel; its LoRA layers stay in place
    state: Tensor = inner.base_model(tokens, use_cache=False).last_hidden_state
    return state


@lru_cache(maxsize=2)
@torch.no_grad()
def make_problem(scenario: Scenario, seed: int) -> Problem:
    """Draws the problem of a seed: the text, where updates are planted, and what they are. Deterministic."""
    draw = torch.Generator().manual_seed(seed)
    base = tiny_blocks(scenario.layers)
    teacher = copy.deepcopy(base)
    names, heads = targets(base, scenario.where)
    tokens = draw_tokens(PARTS, scenario.samples, scenario.block, draw)
    some = tokens["train"][:48]
    covariance, length = moments(base, names, some)
    embedding = cast(Tensor, base.lm_head.weight).double()  # (V, d)
    readout = torch.linalg.cholesky(embedding.T @ embedding).float()  # (d, d)
    before = last_hidden(base, some)
    logits = float((before @ readout).square().sum(-1).mean())

    def change(weight: Tensor, kept: Tensor, update: Tensor, c: float) -> float:
        weight.copy_(kept + c * update)
        got = float(((last_hidden(base, some) - before) @ readout).square().sum(-1).mean())
        weight.copy_(kept)
        return got

    updates: dict[str, Tensor] = {}
    ranks = {name: [0] * (heads[name].count if heads else 1) for name in names}
    for places, count in draw_places(names, heads, scenario.planted, draw):
        left = count
        for place in places if left else []:
            rank = int(torch.randint(1, scenario.most + 1, (), generator=draw))
            weight = cast(Tensor, base.get_submodule(place.module).weight)
            own = float(weight[place.rows, place.columns].norm())
            if scenario.sized == "weight":
                update = draw_update(weight.shape, place, rank, None, draw)
                update *= scenario.relative * own * math.sqrt(rank / scenario.most) / float(update.norm())
            else:
                whitening = whitened(covariance[place.module][place.columns, place.columns], scenario.directions)
                update = draw_update(weight.shape, place, rank, whitening, draw)
                measure = partial(change, weight, weight.clone(), update)
                wanted = scenario.effect**2 * rank * logits
                update *= scale_for(wanted, scenario.effect * length[place.module], measure)
                if update.norm() > scenario.largest * own:
                    continue
            updates[place.module] = updates.get(place.module, 0.0) + update.float()
            ranks[place.module][place.head or 0] = rank
            left -= 1
            if not left:
                break
    for name, update in updates.items():
        cast(Tensor, teacher.get_submodule(name).weight).add_(update)

    hidden = {part: last_hidden(teacher, tokens[part]) for part in PARTS}
    difference = last_hidden(base, tokens["train"]) - hidden["train"]
    return Problem(
        scenario=scenario,
        seed=seed,
        base=base,
        updates=updates,
        true={name: sum(ranks[name]) for name in names},
        true_heads={name: tuple(ranks[name]) for name in heads},
        roots={name: root(covariance[name]).float() for name in updates},
        readout=readout,
        size=float((difference @ readout).square().sum(-1).mean()),
        tokens=tokens,
        hidden=hidden,
    )

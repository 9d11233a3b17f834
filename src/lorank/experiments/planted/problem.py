"""A problem with known true ranks: a frozen model, and the same model with planted low-rank updates.

    teacher:  W* = W + ΔW*,   rank(ΔW*_m) = r*_m, known, different for every module, 0 for about half of the modules
    student:  W + s·B A,      Σ r_m = Σ r*_m, trained on the teacher's logits

    loss = E‖logits(student) − logits(teacher)‖² / E‖logits(model) − logits(teacher)‖²

over tokens of real text: 1 for a student that has learnt nothing, 0 for a student that has learnt everything. The loss
is a mean squared error, not a divergence, because the output embedding E is frozen and shared:
‖E (h − h*)‖² = ‖(h − h*) F‖² with F Fᵀ = EᵀE. So the last hidden states h, a twentieth of the numbers, give the loss
exactly.

``sized="weight"`` (the default) draws ΔW* = c · U V. U (d_out × r*) and V (r* × d_in) have random orthonormal columns
and rows, and c gives ‖ΔW*‖ = relative · ‖W‖ · √(r*/most). Every planted rank changes its own W by the same amount, as
fine-tuning might. The changes of the logits differ: one rank may be worth many times another, and an allocation can be
better than the true one.

``sized="effect"`` makes every planted rank worth the same, so that the true ranks are also the best ranks. This is a
harder problem. It draws ΔW* = c · U G Λ^(−1/2) Qᵀ, where Q Λ Qᵀ are the k main components of the module's inputs and G
(r* × k) has random orthonormal rows: all ranks respond to the inputs equally strongly. c is chosen so that the update
alone changes the logits by E‖change‖² = effect² · r* · E‖logits‖². So updates have different sizes relative to W
(`Problem.relative_norms`). If an update would be larger than W, its place is skipped and another place is drawn.
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
"""The parts of a problem's text, and the split of the manual for each part. The validation part (for scoring ranks) and
the selection part (for choosing learning rates) share no block."""


@dataclass(frozen=True)
class Scenario:
    """Settings of a problem: the planted updates, and the training of students.

    Args:
        where: ``"modules"``: updates in whole modules, all linear maps are adapted; ``"heads"``: updates in attention
            heads (rows of q, k, v, columns of o), the four attention projections are adapted.
        layers: number of the tiny Llama's six blocks that are used.
        planted: the fraction of the modules, or of each module's heads, with an update.
        most: the highest planted rank; ranks are drawn uniformly from 1 to ``most``.
        sized: what is equal for all planted ranks: the change of their own W (``"weight"``) or of the logits
            (``"effect"``).
        relative: for ``"weight"``: ‖ΔW*‖/‖W‖ of an update of rank ``most`` (for a head: of its own rows or columns).
        effect: for ``"effect"``: the change of the logits by one planted rank, relative to the size of the logits (root
            mean square).
        largest: for ``"effect"``: the largest ‖ΔW*‖/‖W‖ of an update (Frobenius norms; for a head: of its own rows or
            columns).
        directions: for ``"effect"``: k, the number of main components of a module's inputs that planted ranks use.
        block: tokens per sample.
        train: number of training samples.
        held_out: number of samples in the selection part, and in the test part.
        scored: number of samples for scoring ranks.
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
        seed: its seed.
        base: the frozen model without updates.
        updates: ΔW*, (d_out, d_in), of every module with an update.
        true: r* of every adapted module, the rank of ΔW*, in the model's order. For heads: the sum over the heads.
        true_heads: the rank of each head, (H,) per module; empty if updates are planted in whole modules.
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
        """Σ r*, the budget of every student."""
        return sum(self.true.values())

    @property
    def relative_norms(self) -> dict[str, float]:
        """‖ΔW*‖/‖W‖ (Frobenius) of every module with an update."""
        weights = {name: cast(Tensor, self.base.get_submodule(name).weight) for name in self.updates}
        return {name: float(update.norm() / weights[name].norm()) for name, update in self.updates.items()}

    def to(self, device: torch.device | str) -> Problem:
        """The same problem with the tensors for training on ``device``. Tensors used only by metrics do not move."""
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
        """All samples of a part, as a batch for :meth:`loss`."""
        return {"input_ids": self.tokens[part], "hidden": self.hidden[part]}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss defined at the top of this file, a scalar.

        Args:
            model: the base model, or a ``PeftModel`` around a copy of it.
            batch: ``input_ids`` (n, T) and the teacher's ``hidden`` states (n, T, d).
        """
        difference = last_hidden(model, batch["input_ids"]) - batch["hidden"]  # (n, T, d)
        loss: Tensor = (difference @ self.readout).square().sum(-1).mean() / self.size
        return loss


def last_hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """The hidden states before the output embedding, (n, T, d)."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()  # without the PeftModel's wrapper; the LoRA layers stay in the model
    state: Tensor = inner.base_model(tokens, use_cache=False).last_hidden_state
    return state


@lru_cache(maxsize=2)
@torch.no_grad()
def make_problem(scenario: Scenario, seed: int) -> Problem:
    """Draws the problem of a seed: its text, and the places and values of its updates. Deterministic."""
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

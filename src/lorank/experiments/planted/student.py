"""One student: a LoRA adapter with a method's initial ranks, trained on the teacher's logits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorank.allocators import START_BATCHES, Allocator
from lorank.experiments.planted.metrics import energy_found, rank_overlap
from lorank.experiments.planted.problem import Problem
from lorank.lora import AdapterLayers, find_layers, make_peft_model, plan_for_rank, resize_
from lorank.training import attach

WARMUP = 0.06
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.99)
"""AdamW's betas for every student. With β₂ = 0.999, the first steps of a rank added later are up to 6.5 times the
learning rate, because its second moment starts at 0 while the optimiser's step count is high; with 0.99, about twice.
"""


@dataclass(frozen=True)
class Outcome:
    """The result of a student.

    Args:
        test: loss on the test part; 1 for the untrained model.
        selection: loss on the selection part, for choosing settings.
        ranks: the final rank of each module.
        overlap: the fraction of the true ranks that the final ranks cover (:func:`rank_overlap`).
        energy: per module with a planted update, the fraction of the update that was found (:func:`energy_found`).
        parameters: trained parameters: (the largest number during the run, the number at the end).
        seconds: training time, including scoring.
        scoring: seconds spent on allocation.
    """

    test: float
    selection: float
    ranks: Mapping[str, int]
    overlap: float
    energy: Mapping[str, float]
    parameters: tuple[int, int]
    seconds: float
    scoring: float


def train_student(
    problem: Problem,
    ranks: Mapping[str, int],
    allocator: Allocator,
    *,
    lr: float,
    device: str = "cpu",
    tick: Callable[[int], None] | None = None,
) -> Outcome:
    """Trains one student. The result is determined by the arguments.

    AdamW (β₂ = 0.99) without weight decay. The learning rate rises over the first 6 % of the steps and then falls
    linearly to 0. The gradient norm is clipped at 1.

    Args:
        problem: the problem; its seed also draws the order of the samples and the student's initial A.
        ranks: the initial rank of each module. A module at rank 0 stays in the model.
        allocator: the method that moves the ranks.
        lr: peak learning rate.
        device: the device for training.
        tick: called with the number of steps done.
    """
    problem = problem.to(device)
    scenario, seed = problem.scenario, problem.seed
    model = make_peft_model(
        copy.deepcopy(problem.base),
        r=1,
        lora_alpha=scenario.scaling,
        target_modules=list(problem.true),
        lora_dropout=0.0,
    )
    layers = find_layers(model)
    resize_(layers, {name: plan_for_rank(0, rank) for name, rank in ranks.items()}, seed=seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, scenario.steps))
    running = attach(
        model,
        optimizer,
        allocator,
        total_steps=scenario.steps,
        steps_per_epoch=scenario.train / scenario.batch,
        validation_batch=problem.batch("validation"),
        train_batches=_start_batches(problem),
        loss_fn=problem.loss,
        seed=seed,
        progress=False,
    )
    most = trained_parameters(layers)
    order = torch.Generator().manual_seed(seed + 1_000_003)
    remaining: list[int] = []
    began = time.perf_counter()
    model.train()
    for step in range(scenario.steps):
        if len(remaining) < scenario.batch:
            remaining = torch.randperm(scenario.train, generator=order).tolist()
        rows, remaining = remaining[: scenario.batch], remaining[scenario.batch :]
        problem.loss(model, {k: v[rows] for k, v in problem.batch("train").items()}).backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        most = max(most, trained_parameters(layers))
        if tick is not None:
            tick(step + 1)
    seconds = time.perf_counter() - began
    running.detach()
    model.eval()
    with torch.no_grad():
        losses = {part: float(problem.loss(model, problem.batch(part))) for part in ("test", "selection")}
    changes = updates_of(layers, list(problem.updates))
    return Outcome(
        test=losses["test"],
        selection=losses["selection"],
        ranks=layers.ranks,
        overlap=rank_overlap(layers.ranks, problem.true),
        energy={
            name: energy_found(changes[name], planted, problem.roots[name]) for name, planted in problem.updates.items()
        },
        parameters=(most, trained_parameters(layers)),
        seconds=seconds,
        scoring=sum(record.seconds for record in running.history.allocations),
    )


def _start_batches(problem: Problem) -> list[dict[str, Tensor]]:
    """The batches of training data for methods that begin with the gradient."""
    scenario = problem.scenario
    draw = torch.Generator().manual_seed(problem.seed + 2_000_003)
    rows = torch.randperm(scenario.train, generator=draw)[: START_BATCHES * scenario.batch]
    return [{k: v[part] for k, v in problem.batch("train").items()} for part in torch.split(rows, scenario.batch)]


def lr_factor(step: int, steps: int) -> float:
    """The learning rate after ``step`` steps, as a fraction of its peak: a linear warm-up, then linearly to 0."""
    return min((step + 1) / max(1.0, WARMUP * steps), (steps - step) / (steps * (1 - WARMUP)), 1.0)


def trained_parameters(layers: AdapterLayers) -> int:
    """Number of trained parameters in A and B. For LoRA per head: only the parameters inside the heads' blocks."""
    return sum(layer.rank * layer.rank_parameters for layer in layers.values())


@torch.no_grad()
def updates_of(layers: AdapterLayers, names: list[str]) -> dict[str, Tensor]:
    """ΔW = s·B diag(g) A of the named modules, (d_out, d_in), on the CPU."""
    found = {}
    for name in names:
        layer = layers[name]
        B = layer.B if layer.gate is None else layer.B * layer.gate
        found[name] = (layer.scaling * B @ layer.A).cpu()
    return found

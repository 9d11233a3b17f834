"""A run's seed and the context that its method reads."""

from __future__ import annotations

import torch

from lorank.allocators import StaticLoRA, TrainingInfo
from lorank.lora import find_layers
from lorank.training.run_state import RunState
from tests.models import adapted, tiny_llama


def run_of(seed: int = 0, lr: float = 1e-2) -> RunState:
    model = adapted(tiny_llama(1), target_modules=["q_proj"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    return RunState(find_layers(model), model, optimizer, StaticLoRA(), TrainingInfo(10, seed=seed))


def test_every_step_of_every_run_has_another_seed() -> None:
    seeds = []
    for seed in (0, 1):
        run = run_of(seed)
        for run.step in range(100):
            seeds.append(run.seed)
    assert len(set(seeds)) == len(seeds)


def test_the_context_has_the_present_step_and_learning_rate() -> None:
    run = run_of(lr=0.5)
    run.step = 3
    context = run.context()
    assert (context.step, context.lr, context.peak_lr) == (3, 0.5, 0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
    run.optimizer.step()
    scheduler.step()
    assert (run.context().lr, run.context().peak_lr) == (0.25, 0.5)


def test_an_optimiser_without_a_learning_rate_has_zero() -> None:
    run = run_of()
    del run.optimizer.param_groups[0]["lr"]
    run.optimizer.defaults.clear()
    run = RunState(run.layers, run.model, run.optimizer, run.allocator, run.info)
    assert (run.context().lr, run.context().peak_lr) == (0.0, 0.0)

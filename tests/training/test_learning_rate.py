"""The factor of a schedule: the adapter's rate over its peak, never above 1, whatever the schedule and the group."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import lorank
from lorank.lora import find_layers
from lorank.training.learning_rate import adapter_group
from tests.models import adapted, tiny_llama, token_batch

STEPS, PEAK = 12, 1e-2
Schedule = Callable[[torch.optim.Optimizer], Any]

# Each schedule with the peak that its factors refer to in each step; None: the highest rate so far.
SCHEDULES: dict[str, tuple[Schedule, float | None]] = {
    "linear with warm-up": (lambda o: get_linear_schedule_with_warmup(o, 4, STEPS), PEAK),
    "cosine with warm-up": (lambda o: get_cosine_schedule_with_warmup(o, 4, STEPS), PEAK),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=STEPS + 1), 0.3),
    "one cycle below the constructor's rate": (lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=STEPS + 1), 1e-3),
    "warm restarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3), PEAK),
    "steps": (lambda o: lr_scheduler.StepLR(o, 3, 0.5), PEAK),
    "warm-up, then exponential": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
        PEAK,
    ),
    "cyclic": (lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=False), None),
    "growing": (lambda o: lr_scheduler.ExponentialLR(o, 1.5), None),
    "above 1": (lambda o: lr_scheduler.LambdaLR(o, lambda step: (1, 7, 3, 9)[step % 4]), None),
}


class Run:
    """A run with a head in the first parameter group, and the adapter in the second."""

    def __init__(
        self, schedule: Schedule | None, allocator: Any = None, *, late: bool = False, head: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.model = adapted(tiny_llama(1), target_modules=["q_proj", "v_proj"])
        self.model.train()
        self.head = nn.Parameter(torch.ones(3))
        weights = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [self.head], "lr": 0.5}] if head else []
        self.optimizer = torch.optim.SGD([*groups, {"params": weights, "lr": PEAK}], lr=7.0)
        self.scheduler = schedule(self.optimizer) if schedule and not late else None
        self.ranks = lorank.attach(
            self.model, self.optimizer, allocator or lorank.SoRA(prune_every=2), total_steps=STEPS
        )
        if late and schedule:
            self.scheduler = schedule(self.optimizer)
        self.factors: list[float] = []
        self.rates: list[float] = []

    def train(self, steps: range = range(STEPS)) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            (self.model(**token_batch(seed=step)).loss + self.head.sum()).backward()
            handle = self.optimizer.register_step_post_hook(lambda *_: self._note())
            self.optimizer.step()
            handle.remove()
            if self.scheduler is not None:
                self.scheduler.step(*([1.0] if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau) else []))

    def _note(self) -> None:
        self.factors.append(self.ranks._run.context().lr_factor)
        self.rates.append(self.optimizer.param_groups[-1]["lr"])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_factor_is_the_adapters_rate_over_its_peak(name: str, late: bool) -> None:
    """Also if the schedule is made after the run is attached. The rates are read from the optimiser."""
    schedule, peak = SCHEDULES[name]
    run = Run(
        schedule, lorank.SoRA(prune_every=2, l1=1e-9), late=late, head="one cycle" not in name and name != "cyclic"
    )
    run.train()
    floor = 0.0 if peak is not None else run.optimizer.param_groups[-1]["initial_lr"]
    highest = [peak or max([floor, *run.rates[: step + 1]]) for step in range(STEPS)]
    assert run.factors == [rate / top for rate, top in zip(run.rates, highest, strict=True)]
    assert max(run.factors) <= 1


def test_a_plateau_refers_to_the_rate_at_the_start() -> None:
    run = Run(lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1))
    run.train()
    assert run.factors[0] == 1
    assert run.factors == [rate / PEAK for rate in run.rates]
    assert run.factors[-1] < 0.2


def test_without_a_schedule_the_factor_is_one() -> None:
    run = Run(None)
    run.train()
    assert run.factors == [1.0] * STEPS


def test_rates_set_by_hand_refer_to_the_rate_when_attached() -> None:
    run = Run(None)
    for step in range(4):
        run.optimizer.param_groups[1]["lr"] = PEAK * (step + 1) / 4
        run.train(range(step, step + 1))
    assert run.factors == [0.25, 0.5, 0.75, 1.0]


def gates_of(run: Run) -> torch.Tensor:
    assert run.ranks.layers.gates is not None
    return run.ranks.layers.gates.values.clone()


@pytest.mark.parametrize("method", [lorank.SoRA(prune_every=4, l1=1e-3), lorank.AdaLoRA(t_init=2, t_final=4)])
def test_gates_do_not_depend_on_how_a_schedule_states_its_peak(method: Any) -> None:
    """OneCycleLR, and the same rates as multiples of the peak; the adapter in the first or the second group."""
    found = []
    one_cycle = lr_scheduler.OneCycleLR(torch.optim.SGD([torch.ones(1)], lr=1.0), 0.25, total_steps=STEPS + 1)
    factors = []
    for _ in range(STEPS + 1):
        factors.append(one_cycle.get_last_lr()[0] / 0.25)
        one_cycle.optimizer.step()
        if len(factors) <= STEPS:
            one_cycle.step()

    def as_multiples(optimizer: torch.optim.Optimizer) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = 0.25
        return lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, STEPS)])

    for schedule, head in (
        (lambda o: lr_scheduler.OneCycleLR(o, 0.25, total_steps=STEPS + 1, cycle_momentum=False), True),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.25, total_steps=STEPS + 1, cycle_momentum=False), False),
        (as_multiples, False),
    ):
        run = Run(schedule, method, head=head)
        run.train(range(STEPS - 1))
        found.append(gates_of(run))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["growing", "above 1", "by hand"])
def test_the_peak_survives_a_resume(name: str) -> None:
    """Gates are bitwise equal, also when the highest rate was long before the checkpoint."""
    method = lorank.SoRA(prune_every=4, l1=1e-3)

    def train(run: Run, steps: range) -> None:
        for step in steps:
            if name == "by hand":
                run.optimizer.param_groups[1]["lr"] = PEAK * (3.0 if step == 1 else 0.5)
            run.train(range(step, step + 1))

    schedule = None if name == "by hand" else SCHEDULES[name][0]
    whole = Run(schedule, method)
    train(whole, range(6))
    buffer = io.BytesIO()
    weights = {key: value for key, value in whole.model.state_dict().items() if "lora_" in key}
    scheduler = whole.scheduler.state_dict() if whole.scheduler else None
    torch.save((weights, whole.optimizer.state_dict(), copy.deepcopy(scheduler)), buffer)
    train(whole, range(6, STEPS - 1))
    buffer.seek(0)
    resumed = Run(schedule, method)
    weights, optimizer, scheduler = torch.load(buffer, weights_only=False)
    resumed.model.load_state_dict(weights, strict=False)
    resumed.optimizer.load_state_dict(optimizer)
    if resumed.scheduler:
        resumed.scheduler.load_state_dict(scheduler)
    with torch.no_grad():
        resumed.head.copy_(whole.head)
    train(resumed, range(6, STEPS - 1))
    assert resumed.factors == whole.factors[6:]
    assert torch.equal(gates_of(resumed), gates_of(whole))


def test_a_group_that_is_not_trained_is_passed_over() -> None:
    model = adapted(tiny_llama(1), target_modules=["q_proj"])
    layers = find_layers(model)
    (layer,) = layers.values()
    optimizer = torch.optim.SGD([{"params": [layer.A], "lr": 0.0}, {"params": [layer.B], "lr": 0.5}], lr=1.0)
    assert adapter_group(optimizer, layers) is optimizer.param_groups[1]

"""Optimisers for the conformance tests: all of PyTorch's, the Trainer's that install here, and look-alikes of others.

The look-alikes have the class names, state and order of operations of optimisers that are not installed. They are as
short as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

Make = Callable[[Any], torch.optim.Optimizer]


class AdamWScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW: gradients at y (the parameters), a sequence z in the state, the average x for evaluation."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "k": 0, "weight_sum": 0.0, "train_mode": True})

    @torch.no_grad()
    def _swap(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        beta = group["betas"][0]
                        parameter.lerp_(self.state[parameter]["z"], 1 - beta if train else 1 - 1 / beta)
            group["train_mode"] = train

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"]
            beta, beta2 = group["betas"]
            lr = group["lr"] * (1 - beta2 ** (group["k"] + 1)) ** 0.5
            group["weight_sum"] += lr**2
            share = lr**2 / group["weight_sum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "z" not in state:
                    state["z"] = parameter.detach().clone()
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                direction = parameter.grad / square.sqrt().add_(1e-8)
                parameter.lerp_(state["z"], share).add_(direction, alpha=lr * (beta * (1 - share) - 1))
                state["z"].sub_(direction, alpha=lr)
            group["k"] += 1


class WithEntry(torch.optim.SGD):
    """Plain gradient descent with one more entry in its state, of which it knows only how to make it."""

    def __init__(self, params: Any, entry: Callable[[nn.Parameter], Any], key: str = "entry") -> None:
        super().__init__(params, lr=1e-2)
        self.make_entry, self.key = entry, key

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and self.key not in self.state[parameter]:
                self.state[parameter][self.key] = self.make_entry(parameter)
        return result


class OwnAdam(torch.optim.Optimizer):
    """An optimiser of one's own, with moments that begin at zero, as most have."""

    def __init__(self, params: Any, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": 1e-2, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
                gradient = parameter.grad + group["weight_decay"] * parameter
                state["step"] += 1
                state["m"].lerp_(gradient, 0.1)
                state["v"].lerp_(gradient.square(), 0.001)
                parameter.sub_(group["lr"] * state["m"] / (state["v"].sqrt() + 1e-8))


class Elsewhere(torch.optim.SGD):
    """Momentum in an attribute, by the parameters' names."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-2)
        self.momenta: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            if parameter.grad is not None:
                momentum = self.momenta.setdefault(index, torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
                parameter.sub_(momentum, alpha=1e-2)


class InAnObject(OwnAdam):
    """An average of each weight in an object of its own."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params)
        self.keeper = SimpleNamespace(averages=[parameter.detach().clone() for parameter in params])


class Named(Elsewhere):
    """Momentum in ``optimizer.state``, but under names."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            if parameter.grad is not None:
                state = self.state[f"parameter {index}"]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
                parameter.sub_(momentum, alpha=1e-2)


class FillsGradients(OwnAdam):
    """An optimiser that makes a zero gradient where there is none, and divides by the parameter's size."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.sub_(parameter.grad, alpha=1 / parameter.numel())


class Prodigy(OwnAdam):
    """Only the name matters: one step size for all parameters is estimated."""


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around an inner optimiser with the same parameter groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = torch.optim.AdamW(self.param_groups, lr=1e-2)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for parameter in parameters:
            self.state[parameter]["e_w"] = parameter.grad * (0.05 / (norm + 1e-12))
            parameter.add_(self.state[parameter]["e_w"])
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        for parameter in parameters:
            parameter.sub_(self.state[parameter]["e_w"])
        self.base_optimizer.step()
        return loss


class Lookahead(torch.optim.Optimizer):
    """Slow weights around an inner optimiser."""

    def __init__(self, params: Any) -> None:
        self.fast = torch.optim.AdamW(params, lr=1e-2)
        super().__init__(self.fast.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.fast.step(closure)


class Chain(torch.optim.Optimizer):
    """One object with the groups of two optimisers."""

    def __init__(self, params: Any) -> None:
        self.parts = [torch.optim.AdamW(params[::2]), torch.optim.AdamW(params[1::2])]
        super().__init__(params, {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


TORCH: dict[str, Make] = {
    name: (lambda params, kind=kind: kind(params, lr=1e-2, **NO_DECAY.get(kind.__name__, {})))
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
NO_DECAY = {"AdamW": {"weight_decay": 0.0}, "Muon": {"weight_decay": 0.0}, "ASGD": {"lambd": 0.0}}
VARIANTS: dict[str, Make] = {
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, fused=True),
    "Adagrad, starting at 0.1": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "ASGD, averaging": lambda p: torch.optim.ASGD(p, lr=1e-2, lambd=0.0, t0=0),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "Rprop, small steps": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "schedule-free": AdamWScheduleFree,
    "own": OwnAdam,
}


def _without_decay(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    if hasattr(optimizer, "train"):  # schedule-free optimisers; the Trainer calls it too
        optimizer.train()
    return optimizer


def _of_the_trainer() -> dict[str, Make]:
    found: dict[str, Make] = {}
    for name in OptimizerNames:
        try:
            arguments = TrainingArguments(gettempdir(), optim=name.value, use_cpu=True, learning_rate=1e-2)
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        except (ImportError, ValueError):
            continue
        found[f"optim={name.value}"] = lambda params, kind=kind, settings=settings: _without_decay(
            kind(params, **settings)
        )
    return found


OF_THE_TRAINER = _of_the_trainer()
REFUSED: dict[str, str] = {
    "LBFGS": "LBFGS keeps one history of all parameters together",
    "SparseAdam": "SparseAdam needs sparse gradients",
}
ALL: dict[str, Make] = {**TORCH, **VARIANTS, **OF_THE_TRAINER}
COUPLED = ("Adafactor", "Muon", "optim=adafactor")  # their steps couple ranks, so no other run gives the same numbers
QUANTISED = {name for name in OF_THE_TRAINER if "8bit" in name or "4bit" in name}
"""Their moments have 4,096 numbers or more."""

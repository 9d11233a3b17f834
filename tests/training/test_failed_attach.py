"""``attach`` starts a run or leaves everything as it was, whatever the mistake; then the call can be corrected."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorank
from lorank.allocators import Allocator
from lorank.errors import DisagreementError, LorankError, ValidationBatchError
from lorank.files import WriteError
from lorank.lora import find_layers
from lorank.training.parallel.coordinator import ProcessCoordinator
from tests.messages import warnings_of_lorank
from tests.methods import METHODS, STEPS
from tests.models import adapted, tiny_llama, token_batch
from tests.training.loops import adamw
from tests.training.test_attached_runs import failing_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """All that a failed call could leave different, by name."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        found[f"{name}: object"] = id(parameter)
        found[f"{name}: values"] = parameter.detach().clone()
        found[f"{name}: gradient"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"{name}: trained"] = parameter.requires_grad
        found[f"{name}: moments"] = copy.deepcopy(dict(optimizer.state.get(parameter, {})))
    for name, module in model.named_modules():
        found[f"{name}: kind"] = (type(module), module.training, sorted(vars(module)))
        tables = {key: list(table) for key, table in vars(module).items() if key.endswith("_hooks") and table}
        found[f"{name}: hooks"] = tables
        if hasattr(module, "lora_variant"):
            settings = ("r", "lora_alpha", "scaling", "lora_variant")
            found[f"{name}: PEFT"] = {key: dict(getattr(module, key)) for key in settings}
            found[f"{name}: widths"] = str(module.lora_A) + str(module.lora_B)
    config = find_layers(model).config
    found["config"] = {field.name: copy.copy(getattr(config, field.name)) for field in fields(config)}
    found["optimiser's hooks"] = {k: list(v) for k, v in vars(optimizer).items() if k.endswith("_hooks")}
    found["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    found["random"] = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    found["files"] = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return found


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return [] if before.shape == after.shape and torch.equal(before, after) else [place]
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = list(dict.fromkeys([*before, *after]))
        return [one for key in keys for one in differences(before.get(key), after.get(key), f"{place}/{key}")]
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        return [
            one for i, pair in enumerate(zip(before, after, strict=True)) for one in differences(*pair, f"{place}/{i}")
        ]
    return [] if before == after else [place]


def trained(method: str, *, steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    """After a step, so that the optimiser has moments; with the gradients of the next one. Fresh for heads (B = 0)."""
    model = adapted(tiny_llama(), random_B=False, lora_dropout=0.1, **METHODS[method].lora).train()
    optimizer = adamw(model)
    for seed in range(steps + 1):
        optimizer.zero_grad()
        model(**token_batch(seed=seed)).loss.backward()
        if seed < steps:
            optimizer.step()
    return model, optimizer


def loss_that_fails(model: nn.Module, batch: Any) -> Any:
    model.eval()
    torch.rand(1)
    model(**batch)
    raise RuntimeError("this loss cannot be computed")


def no_labels() -> dict[str, Any]:
    batch = token_batch(seed=9)
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def stale_moments(optimizer: torch.optim.Optimizer) -> None:
    next(iter(optimizer.state.values()))["exp_avg"] = torch.zeros(3, 3)


def other_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lorank"] = {"version": 1}


BATCH = [name for name, method in METHODS.items() if method.make().needs_validation_batch]
OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "no steps": ({"total_steps": 0}, LorankError, ["sora", "ard-heads"]),
    "no batch": ({"validation_batch": None}, LorankError, BATCH),
    "no labels": ({"validation_batch": no_labels()}, LorankError, ["alora", "alora-dnas"]),
    "the loss fails": ({"loss_fn": loss_that_fails}, ValidationBatchError, ["alora", "alora-dnas"]),
    "the history cannot be written": ({"history_path": "file/history.jsonl"}, WriteError, list(METHODS)),
    "a budget that is too small": ({"budget": "1 rank"}, LorankError, ["ard"]),
    "a budget that is too large": ({"budget": "9999 ranks"}, LorankError, list(METHODS)),
    "processes that differ": ({}, DisagreementError, list(METHODS)),
    "another optimiser": ({}, LorankError, ["adalora", "ard-heads"]),
    "moments of another shape": ({}, LorankError, ["adalora", "alora"]),
    "a damaged rank state": ({}, LorankError, ["sora", "ard-heads"]),
}
CASES = [(mistake, method) for mistake, (_, _, methods) in OPTIONS.items() for method in methods]


@pytest.mark.parametrize(("mistake", "method"), CASES)
def test_a_failed_call_leaves_everything_as_it_was(
    mistake: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, error, _ = OPTIONS[mistake]
    model, optimizer = trained(method, steps=0 if method == "ard-heads" else 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "history.jsonl").write_text("of an earlier run\n")
    (tmp_path / "file").write_text("not a folder")
    if mistake == "processes that differ":

        def differ(*_: Any) -> None:
            raise DisagreementError("ranks differ")

        monkeypatch.setattr(ProcessCoordinator, "after_allocation", differ)
    if mistake == "moments of another shape":
        stale_moments(optimizer)
    if mistake == "a damaged rank state":
        other_state(optimizer)
    used = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1) if mistake == "another optimiser" else optimizer
    settings: dict[str, Any] = {"validation_batch": token_batch(seed=9), "total_steps": STEPS, **options}
    settings.setdefault("history_path", "history.jsonl")
    allocator = METHODS[method].make(settings.pop("budget", None))
    before = everything(model, optimizer, tmp_path)
    with pytest.raises(error):
        lorank.attach(model, used, allocator, **settings)
    assert not differences(before, everything(model, optimizer, tmp_path))


Make = Callable[[], Allocator]
CORRECTIONS: dict[str, tuple[Make, Make]] = {
    "ARD-LoRA's budget": (lambda: lorank.ARDLoRA(budget="10 ranks"), lambda: lorank.ARDLoRA(budget="100 ranks")),
    "ALoRA's rounds": (
        lambda: lorank.ALoRASensi(budget=6, per_round=10_000),
        lambda: lorank.ALoRASensi(budget=6, per_round=9),
    ),
    "AdaLoRA's phases": (lambda: lorank.AdaLoRA(t_init=90), lambda: lorank.AdaLoRA(t_init=1, t_final=2)),
}


@pytest.mark.parametrize("which", CORRECTIONS)
def test_the_corrected_call_is_as_if_there_had_been_no_mistake(which: str) -> None:
    wrong, right = CORRECTIONS[which]
    ends = []
    for mistake in (True, False):
        model = adapted(tiny_llama(), random_B=False)
        optimizer = adamw(model)
        settings: dict[str, Any] = {"validation_batch": token_batch(seed=9), "total_steps": STEPS}
        if mistake:
            with pytest.raises(LorankError):
                lorank.attach(model, optimizer, wrong(), **settings)
        with warnings_of_lorank() as heard:
            lorank.attach(model, optimizer, right(), **settings)
        assert not any("retry" in message for message in heard)
        for seed in range(STEPS):
            model(**token_batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.state_dict())
    assert not differences(*ends)


def test_a_run_that_could_not_take_the_place_of_another_leaves_plain_lora() -> None:
    model = adapted(tiny_llama(), random_B=False)
    optimizer = adamw(model)
    first = lorank.attach(model, optimizer, METHODS["sora"].make(), total_steps=STEPS)
    with pytest.raises(LorankError, match="9999 ranks"):
        lorank.attach(model, optimizer, METHODS["sora"].make("9999 ranks"), total_steps=STEPS, replace=True)
    assert not first.attached
    assert all(not layer.module.lora_variant for layer in find_layers(model).values())


def test_a_trainer_whose_run_could_not_begin_is_corrected_and_resumes(tmp_path: Path) -> None:
    """The callback's hook is still there: the weights of the checkpoint have other ranks than the model."""
    model = adapted(tiny_llama(), random_B=False)
    straight = failing_trainer(tmp_path, "sora", model, save_strategy="steps", save_steps=8)
    straight.times = 0
    straight.train()
    trainer = failing_trainer(tmp_path, "sora", adapted(tiny_llama(), random_B=False))
    trainer.times = 0
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, lorank.RankCallback))
    callback.allocator, right = METHODS["sora"].make("9999 ranks"), callback.allocator
    with pytest.raises(LorankError, match="9999 ranks"):
        trainer.train()
    callback.allocator = right
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert not differences(model.state_dict(), trainer.model.state_dict())
